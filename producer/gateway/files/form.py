"""Parses an upload's multipart form as it comes in: its fields, and the bytes of its one file, which it passes on.

Knows no store; python-multipart finds the boundaries.
"""

from http import HTTPStatus
from typing import TYPE_CHECKING

from python_multipart import MultipartParser
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import parse_options_header

from producer.gateway.errors import ApiError, invalid_request
from producer.gateway.files.upload_fields import FIELDS, check_field

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_FORM_BYTES = 64 << 10  # of everything but the file
MAX_FILENAME_CHARS = 255


class UploadForm:
    """Push the body with `feed`, then ask for `fields` and `filename`. Raises ApiError (400)."""

    def __init__(self, content_type: str) -> None:
        media_type, options = parse_options_header(content_type)
        if media_type != b"multipart/form-data" or not options.get(b"boundary"):
            message = "content-type: must be multipart/form-data with a boundary"
            raise ApiError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message)
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.num_file_bytes = 0
        self._num_bytes = 0
        self._is_ended = False
        self._header_name = self._header_value = b""
        self._disposition = b""
        self._field: str | None = None  # that is being read; None: the file is
        self._value = b""
        self._chunks: list[bytes] = []
        try:
            self._parser = MultipartParser(options[b"boundary"], self._callbacks())
        except ValueError as error:
            raise invalid_request(f"content-type: {error}") from error

    def feed(self, data: bytes) -> bytes:
        """The bytes of the file among these."""
        try:
            self._parser.write(data)
        except MultipartParseError as error:
            raise invalid_request(f"the body is not a multipart form: {error}") from error
        chunk = b"".join(self._chunks)
        self._chunks.clear()
        self._num_bytes += len(data)
        self.num_file_bytes += len(chunk)
        if self._num_bytes - self.num_file_bytes > MAX_FORM_BYTES:
            raise invalid_request(f"the form is larger than {MAX_FORM_BYTES} bytes without its file")
        return chunk

    def end(self) -> None:
        """After the last byte."""
        if not self._is_ended:
            raise invalid_request("the body ends in the middle of its form")
        if self.filename is None:
            raise invalid_request("file: is needed, as a part with a filename", "file")
        if self.num_file_bytes == 0:
            raise invalid_request("file: is empty", "file")

    def _callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": self._on_header_name,
            "on_header_value": self._on_header_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._begin_value,
            "on_part_data": self._on_data,
            "on_part_end": self._end_part,
            "on_end": self._end_form,
        }

    def _begin_part(self) -> None:
        self._disposition = self._value = b""

    def _on_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _begin_value(self) -> None:
        _, options = parse_options_header(self._disposition.decode("latin-1"))
        name, filename = _text(options.get(b"name", b""), "name"), options.get(b"filename")
        if name == "file":
            if filename is None:
                raise invalid_request("file: must be a part with a filename", "file")
            if self.filename is not None:
                raise invalid_request("file: is given twice", "file")
            self.filename, self._field = _clean_filename(_text(filename, "file")), None
            return
        if name not in FIELDS:
            allowed = ", ".join(("file", *FIELDS))
            shown = name[:60] or "a part without a name"
            raise invalid_request(f"{shown}: is not a field of an upload; the fields are {allowed}", name)
        if name in self.fields:
            raise invalid_request(f"{name}: is given twice", name)
        self._field = name

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self._chunks.append(data[start:end])
        else:
            self._value += data[start:end]

    def _end_part(self) -> None:
        if self._field is not None:
            value = _text(self._value, self._field)
            check_field(self._field, value)
            self.fields[self._field] = value

    def _end_form(self) -> None:
        self._is_ended = True


def _text(value: bytes, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise invalid_request(f"{name}: is not UTF-8 text", name) from error


def _clean_filename(given: str) -> str:
    """The name without folders, and without what would break a header. It is shown, and never used as a path."""
    name = given.replace("\\", "/").rpartition("/")[2].strip()
    if not name or len(name) > MAX_FILENAME_CHARS or not name.isprintable():
        raise invalid_request(f"file: its filename must have 1 to {MAX_FILENAME_CHARS} printable characters", "file")
    return name
