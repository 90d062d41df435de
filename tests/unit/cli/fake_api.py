"""A daemon of cardboard: answers on a unix socket with what a test puts into it."""

import json
import socketserver
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class Call:
    """A request that came in."""

    def __init__(self, method: str, path: str, query: dict[str, str], body: bytes) -> None:
        self.method, self.path, self.query, self.body = method, path, query, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class FakeApi:
    """``routes`` maps ("GET", "/v1/vms") to JSON, to (status, JSON), to bytes, or to a function of
    the call that returns one of these. Whatever is not there is an error 404."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.routes: dict[tuple[str, str], Any] = {("GET", "/v1/images"): page()}
        self.calls: list[Call] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                parts = urlsplit(self.path)
                query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
                call = Call(self.command, unquote(parts.path), query, self.read_body())
                fake.calls.append(call)
                status, data, kind = fake.answer(call)
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_one

            def read_body(self) -> bytes:
                if self.headers.get("transfer-encoding") == "chunked":
                    data = b""
                    while size := int(self.rfile.readline(), 16):
                        data += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                    return data
                return self.rfile.read(int(self.headers.get("content-length") or 0))

            def log_message(self, *args: object) -> None:
                pass

        class Server(socketserver.ThreadingUnixStreamServer):
            daemon_threads = True

        path.parent.mkdir(parents=True, exist_ok=True)
        self.server = Server(str(path), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def answer(self, call: Call) -> tuple[int, bytes, str]:
        found = self.routes.get((call.method, call.path))
        if callable(found):
            found = found(call)
        if found is None:
            found = not_found(call.path)
        if isinstance(found, bytes):
            return 200, found, "application/octet-stream"
        status, value = found if isinstance(found, tuple) else (200, found)
        return status, json.dumps(value).encode(), "application/json"

    def sent(self, method: str, path: str) -> list[Call]:
        return [call for call in self.calls if (call.method, call.path) == (method, path)]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.path.unlink(missing_ok=True)


def page(*items: Any, revision: int = 1) -> dict[str, Any]:
    return {"items": list(items), "revision": revision, "next": None}


def problem(status: int, code: str, detail: str, **more: Any) -> tuple[int, dict[str, Any]]:
    return status, {"title": "t", "status": status, "code": code, "detail": detail, **more}


def not_found(path: str) -> tuple[int, dict[str, Any]]:
    _, _, noun, name, *_ = [*path.split("/"), "", ""]
    object = f"{noun.removesuffix('s')} {name}"
    return problem(404, "not-found", f"{object} not found", object=object)


def vm(name: str = "web1", state: str = "running", **spec: Any) -> dict[str, Any]:
    return {
        "meta": {"id": f"vm-{name:0>16}", "name": name, "created": 1e9, "labels": {}},
        "spec": {"cpus": 2, "memory": 1 << 30, "image": "img-1", "ports": [], **spec},
        "status": {"state": state, "addresses": [], "instance": None},
    }


def task(
    id: str = "task-1",
    verb: str = "vm.start",
    name: str = "web1",
    state: str = "succeeded",
    **status: Any,
) -> dict[str, Any]:
    return {
        "meta": {"id": id, "name": id, "created": 1e9},
        "spec": {"verb": verb, "object": {"kind": "vm", "id": f"vm-{name}", "name": name}},
        "status": {"state": state, "progress": None, "phase": "", "finished": 1e9 + 2, **status},
    }
