"""Which store holds files' bytes. What one needs is imported when it is chosen."""

from pathlib import Path
from urllib.parse import urlsplit

from producer.errors import SettingsError
from producer.gateway.files.base import FileStore


def select_file_store(where: str, *, s3_endpoint_url: str | None = None) -> FileStore:
    """`where` is a folder or `s3://BUCKET/PREFIX`. Raises SettingsError."""
    parts = urlsplit(where)
    if parts.scheme == "s3":
        try:
            from producer.gateway.files.s3 import S3FileStore
        except ImportError as error:
            raise SettingsError(f"--files {where} needs: pip install 'promptmill[s3]' ({error})") from error
        return S3FileStore(parts.netloc, parts.path.strip("/"), endpoint_url=s3_endpoint_url)
    from producer.gateway.files.local import LocalFileStore

    try:
        folder = Path(where).expanduser()
    except RuntimeError as error:
        raise SettingsError(
            f"--files (PROMPTMILL_FILES): {where} is in a home folder, and this user has none: "
            "set HOME, or name another folder or s3://BUCKET/PREFIX"
        ) from error
    return LocalFileStore(folder)
