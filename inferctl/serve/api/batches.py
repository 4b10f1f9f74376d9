"""`/v1/files` and `/v1/batches` of OpenAI, in front of the endpoints whose requests a batch can have."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

import orjson
from pydantic import BaseModel, Field, StrictStr
from starlette.datastructures import QueryParams, UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from inferctl.batching.fairness import Shares
from inferctl.config.spec import Batches
from inferctl.core.partials import new_file
from inferctl.serve.api import schemas
from inferctl.serve.batches.store import DAY_S, KEPT_S, OPEN, Document, OwnerFolder
from inferctl.serve.edge.edge import ClientDisconnectedError, read_body
from inferctl.serve.edge.errors import ApiError, key_share
from inferctl.serve.edge.request_context import ConnectionNotes, context_of

_MAX_FILE_BYTES, _MAX_FORM_BYTES = 200_000_000, 64 * 1024  # of the input of a batch, as OpenAI has it; around it
_MAX_UPLOADS = 8  # at a time, of one process
_FILES, _BATCHES = "/v1/files", "/v1/batches"
_KINDS = {"files": "file", "batches": "batch"}
# Path -> its name in events and in the scopes of keys. With a slash at its end, of all paths below it.
NAMES = dict.fromkeys((_FILES, f"{_FILES}/", _BATCHES, f"{_BATCHES}/"), "batches")
# Path -> the most bytes of a body that is not held in memory.
UPLOADS = {_FILES: _MAX_FILE_BYTES + _MAX_FORM_BYTES}
_TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
_Seconds = Annotated[int, Field(ge=3600, le=2_592_000)]
_Metadata = dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]]


class _NewFile(schemas.ModelRequest):
    purpose: Literal["batch"]
    anchor: Literal["created_at"] = Field("created_at", alias="expires_after[anchor]")
    seconds: _Seconds = Field(KEPT_S, alias="expires_after[seconds]")


class _Expiry(BaseModel):
    anchor: Literal["created_at"]
    seconds: _Seconds


class _NewBatch(schemas.ModelRequest):
    input_file_id: StrictStr
    endpoint: StrictStr
    completion_window: Literal["24h"]
    metadata: Annotated[_Metadata, Field(max_length=16)] | None = None
    output_expires_after: _Expiry | None = None


class _Page(schemas.ModelRequest):
    limit: Annotated[int, Field(ge=1, le=10_000)] | None = None
    after: str | None = None
    order: Literal["asc", "desc"] = "desc"
    purpose: str | None = None


class BatchApi:
    """Responds at the paths in `NAMES`, and passes other requests on to `app`. `paths`: those that a batch can have."""

    def __init__(self, app: ASGIApp, settings: Batches, paths: Collection[str]) -> None:
        assert settings.folder
        self._app, self._folder, self._paths = app, Path(settings.folder), paths
        self._uploads = Shares(_MAX_UPLOADS)
        tempfile.tempdir = settings.folder  # for uploads that are not complete; /tmp may be in memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to one request. Raises `ApiError`, which the edge sends."""
        if not scope["path"].startswith((_FILES, _BATCHES)):
            await self._app(scope, receive, send)
            return
        try:
            await self._respond(scope, receive, send)
        except OSError as error:  # as of a full disk
            message = f"the server cannot store this: {(error.strerror or str(error)).lower()}"
            raise ApiError(507, message, code="storage_full") from None

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        context, thread, found = context_of(scope), asyncio.to_thread, Document()
        # A caller that a proxy names is not the key with the same id.
        owner = context.key and f"{'key' if context.key.digests else 'caller'}:{context.key.id}"
        folder = OwnerFolder.of(self._folder, owner or "")
        match scope["method"], scope["path"].split("/")[2:]:
            case "POST", ["files"]:
                found = await self._upload(folder, Request(scope, receive))
            case "POST", ["batches"]:
                schemas.check_content_type(context.asked.content_type)
                request = schemas.parse(_NewBatch, await read_body(receive), max_inputs=0)
                found = await thread(self._create, folder, owner or "", request)
            case "GET", ["files" | "batches" as kind]:
                raw = orjson.dumps(dict(QueryParams(scope["query_string"])))
                found = await thread(_page, folder, kind, schemas.parse(_Page, raw, max_inputs=0))
            case "GET", ["files", file_id, "content"]:
                _find(folder, "files", file_id)
                ConnectionNotes.of(scope).paced = True
                await FileResponse(folder.path / file_id, media_type="application/jsonl")(scope, receive, send)
                return
            case "GET", ["files" | "batches" as kind, object_id]:
                found = _find(folder, kind, object_id)
            case "DELETE", ["files", file_id]:
                found = await thread(_delete, folder, file_id)
            case "POST", ["batches", batch_id, "cancel"]:
                found = await thread(_cancel, folder, batch_id)
            case _:
                raise ApiError(404, "no such endpoint of files and batches, or not with this method", code="not_found")
        await Response(orjson.dumps(found), media_type="application/json")(scope, receive, send)

    async def _upload(self, folder: OwnerFolder, request: Request) -> Document:
        """Write a file to the disk while it arrives, and give it its name when all of it is there."""
        if not self._uploads.take(folder.path.name):
            raise key_share("uploads")
        try:
            async with request.form(max_files=1, max_fields=16, max_part_size=1024) as form:
                # The charset of a form can make lone surrogates, which orjson refuses to write and then to read.
                raw = json.dumps({name: value for name, value in form.items() if isinstance(value, str)}).encode()
                fields, file = schemas.parse(_NewFile, raw, max_inputs=0), form.get("file")
                if not isinstance(file, UploadFile):
                    raise ApiError(400, "file is missing", code="missing_field", param="file")
                return await asyncio.to_thread(self._store, folder, fields, file)
        except MultiPartException as error:
            raise ApiError(400, error.message, code="invalid_multipart") from None
        except ClientDisconnect:
            raise ClientDisconnectedError from None
        finally:
            self._uploads.release(folder.path.name)

    def _store(self, folder: OwnerFolder, fields: _NewFile, file: UploadFile) -> Document:
        _check_count(folder)
        file_id = f"file-{secrets.token_hex(16)}"
        name = (file.filename or "")[:255].encode(errors="replace").decode()
        try:
            with new_file(folder.path / file_id, 0o600) as target:
                shutil.copyfileobj(file.file, target)
                target.flush()
                os.fsync(target.fileno())
            return folder.add_file(file_id, name, fields.seconds, fields.purpose)
        except OSError:
            folder.delete(file_id)
            raise

    def _create(self, folder: OwnerFolder, owner: str, request: _NewBatch) -> Document:
        if request.endpoint not in self._paths:
            message = f"endpoint must be one of {', '.join(sorted(self._paths))}"
            raise ApiError(400, message, code="invalid_value", param="endpoint")
        if _find(folder, "files", request.input_file_id)["purpose"] != "batch":
            raise ApiError(400, "the purpose of the file is not `batch`", code="invalid_value", param="input_file_id")
        _check_count(folder)
        batch_id, now = f"batch_{secrets.token_hex(16)}", int(time.time())
        folder.marker(batch_id).touch(0o600)
        absent = (*(f"{name}_at" for name in _TIMES), "errors", "output_file_id", "error_file_id")
        return folder.write(
            {
                "id": batch_id,
                "object": "batch",
                "status": "validating",
                "owner": owner,
                **request.model_dump(exclude={"model"}),
                **dict.fromkeys(absent),
                "created_at": now,
                "expires_at": now + DAY_S,
                "request_counts": {"total": 0, "completed": 0, "failed": 0},
            }
        )


def _check_count(folder: OwnerFolder) -> None:
    if folder.full():
        raise ApiError(400, "this key has too many files and batches; delete some", code="storage_full")


def _find(folder: OwnerFolder, kind: str, object_id: str) -> Document:
    found = folder.read(object_id)
    if found is None or found["object"] != _KINDS[kind]:
        raise ApiError(404, f"no such {_KINDS[kind]}: {object_id!r}", code="not_found", param="id")
    return found


def _page(folder: OwnerFolder, kind: str, request: _Page) -> Document:
    limit, found = request.limit or (10_000 if kind == "files" else 20), folder.all(_KINDS[kind])
    if request.order == "desc":
        found.reverse()
    if request.after is not None:
        _find(folder, kind, request.after)
        found = found[[each["id"] for each in found].index(request.after) + 1 :]
    found = [each for each in found if request.purpose in (None, each.get("purpose"))]
    page = found[:limit]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {}
    return {"object": "list", "data": page, "has_more": len(found) > limit, **ends}


def _delete(folder: OwnerFolder, file_id: str) -> Document:
    _find(folder, "files", file_id)
    batches = folder.all("batch")
    if any(each["input_file_id"] == file_id and each["status"] in (*OPEN, "cancelling") for each in batches):
        raise ApiError(409, f"a batch reads {file_id}; cancel it first", code="file_in_use")
    folder.delete(file_id)
    return {"id": file_id, "object": "file", "deleted": True}


def _cancel(folder: OwnerFolder, batch_id: str) -> Document:
    if (status := _find(folder, "batches", batch_id)["status"]) in OPEN:
        (folder.path / f"{batch_id}.cancel").touch(0o600)
    elif status != "cancelling":
        raise ApiError(409, f"the batch is {status}, so it cannot be cancelled", code="batch_ended")
    return _find(folder, "batches", batch_id)
