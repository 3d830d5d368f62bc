"""Where a test's files lie: a folder or a bucket, and what is in it, seen from outside."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3


@dataclass(frozen=True)
class FolderOfFiles:
    folder: Path

    @property
    def settings(self) -> dict[str, Any]:
        return {"files": str(self.folder)}

    def names(self) -> set[str]:
        """Of everything there is, whole or not."""
        return {path.name for path in self.folder.iterdir() if not path.name.startswith(".")}

    def remove(self, name: str) -> None:
        (self.folder / name).unlink()


@dataclass(frozen=True)
class BucketOfFiles:
    endpoint: str
    prefix: str

    @property
    def settings(self) -> dict[str, Any]:
        return {"files": f"s3://results/{self.prefix}", "s3_endpoint_url": self.endpoint}

    def names(self) -> set[str]:
        client = boto3.client("s3", endpoint_url=self.endpoint)
        prefix = f"{self.prefix}/"
        listed = client.list_objects_v2(Bucket="results", Prefix=prefix).get("Contents", [])
        begun = client.list_multipart_uploads(Bucket="results", Prefix=prefix).get("Uploads", [])
        names = {entry["Key"].removeprefix(prefix) for entry in [*listed, *begun]}
        return {name for name in names if not name.startswith(".")}

    def remove(self, name: str) -> None:
        boto3.client("s3", endpoint_url=self.endpoint).delete_object(Bucket="results", Key=f"{self.prefix}/{name}")


PlaceOfFiles = FolderOfFiles | BucketOfFiles
