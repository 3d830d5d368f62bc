"""The usual way of taking an upload: FastAPI's UploadFile, then a copy to its place. Started by `file_upload.py`.

python -m benchmarks.upload_file_peer PORT FOLDER
"""

import shutil
import sys
import time
from pathlib import Path
from typing import Annotated
from uuid import uuid4

import uvicorn
from fastapi import FastAPI, File, Form, UploadFile
from fastapi.responses import FileResponse

app = FastAPI()
folder = Path(sys.argv[2])


@app.post("/v1/files")
def upload(file: Annotated[UploadFile, File()], purpose: Annotated[str, Form()]) -> dict[str, object]:
    file_id = uuid4().hex
    with (folder / file_id).open("wb") as target:
        shutil.copyfileobj(file.file, target)
    return {
        "id": file_id,
        "object": "file",
        "bytes": (folder / file_id).stat().st_size,
        "created_at": int(time.time()),
        "filename": file.filename,
        "purpose": purpose,
        "status": "processed",
    }


@app.get("/v1/files/{file_id}/content")
def content(file_id: str) -> FileResponse:
    return FileResponse(folder / file_id)


@app.delete("/v1/files/{file_id}")
def delete(file_id: str) -> dict[str, object]:
    (folder / file_id).unlink()
    return {"id": file_id, "object": "file", "deleted": True}


@app.get("/health/live")
def live() -> dict[str, str]:
    return {"status": "alive"}


if __name__ == "__main__":
    folder.mkdir()
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
