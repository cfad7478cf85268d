#!/usr/bin/env python3
"""The cache of the Hugging Face Hub, filled by one program and read by the other without network.

    check_hub.py BIN [--model DIR]     BIN is the directory of the programs (target/debug)

A local server speaks the Hub's routes. cpift-merge downloads a model from it, and huggingface_hub
(and transformers with PyTorch, if they are installed) read it with HF_HUB_OFFLINE=1; then
snapshot_download fills another cache, and cpift-merge reads that. Both caches have the same files,
blobs, links and refs, and neither side downloads again what the other has. Needs
`pip install huggingface_hub`."""
import argparse
import hashlib
import http.server
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "org/tiny"
CONTENT: list[str] = []


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def handler(files: dict[str, bytes]) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if path.startswith("/cdn/"):
                name = path.removeprefix("/cdn/")
                CONTENT.append(name)
                self.content(files[name], {})
            elif path.startswith((f"/api/models/{MODEL}/revision/", f"/api/models/{MODEL}")):
                siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
                info = {"_id": "0", "id": MODEL, "sha": COMMIT, "siblings": siblings, "private": False, "gated": False}
                if "/tree/" in path:
                    info = [{"type": "file", "path": n, "size": len(d), "oid": git_hash(d)} for n, d in files.items()]
                self.answer(200, {"Content-Type": "application/json"}, json.dumps(info).encode())
            elif path.startswith(f"/{MODEL}/resolve/"):
                name = path.removeprefix(f"/{MODEL}/resolve/").split("/", 1)[1]
                if name not in files:
                    self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"")
                elif name.endswith(".safetensors"):
                    data = files[name]
                    self.answer(302, {"X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(data)),
                                      "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                                      "ETag": f'"{git_hash(data)}"', "Location": f"http://localhost:{self.server.server_port}/cdn/{name}"}, b"")
                else:
                    if self.command == "GET":
                        CONTENT.append(name)
                    self.content(files[name], {"X-Repo-Commit": COMMIT, "ETag": f'"{git_hash(files[name])}"'})
            else:
                self.answer(404, {"X-Error-Code": "RepoNotFound"}, b"")

        do_HEAD = do_GET

        def content(self, data: bytes, headers: dict[str, str]) -> None:
            first = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0]
            if int(first) == 0:
                return self.answer(200, headers, data)
            span = {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"}
            return self.answer(206, {**headers, **span}, data[int(first):])

    return Handler


def run(command: list[str], cache: Path, url: str, offline: bool) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE", "TRANSFORMERS_"))}
    env |= {"HF_HOME": str(cache), "HF_ENDPOINT": url, "HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def tree(cache: Path) -> dict[str, str]:
    """Files of the repository in a cache by path: links by their targets, others by their hash."""
    folder = cache / "hub" / ("models--" + MODEL.replace("/", "--"))
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = os.readlink(path)
        elif path.is_file():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


READ = """
import sys
from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download
print(snapshot_download("org/tiny"))
for name in sys.argv[1:]:
    assert open(hf_hub_download("org/tiny", name), "rb").read()
cache = scan_cache_dir()
assert not cache.warnings, cache.warnings
repo, = cache.repos
revision, = repo.revisions
assert revision.refs == {"main"} and len(revision.files) == len(sys.argv) - 1, revision
"""

LOGITS = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokens = AutoTokenizer.from_pretrained("org/tiny")("one two three", return_tensors="pt").input_ids
with torch.no_grad():
    logits = AutoModelForCausalLM.from_pretrained("org/tiny")(tokens).logits
print(tuple(logits.shape), logits.double().sum().item())
"""

DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
snapshot_download("org/tiny", allow_patterns=sys.argv[1:])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bin", type=Path, help="directory of the programs")
    parser.add_argument("--model", type=Path, default=ROOT / "fixtures/demo/base", help="model that is served")
    args = parser.parse_args()
    files = {path.name: path.read_bytes() for path in sorted(args.model.iterdir()) if path.is_file()}
    files = {name: data for name, data in files.items() if name != "cpift.json"}
    wanted = [name for name in files if not name.endswith(".md")]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(files))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    verify = [str(args.bin / "cpift-merge"), "verify", MODEL, "--json"]
    python = [sys.executable, "-c"]
    with tempfile.TemporaryDirectory() as work:
        ours, theirs = Path(work) / "ours", Path(work) / "theirs"

        first = json.loads(run(verify, ours, url, offline=False))
        CONTENT.clear()
        place = run([*python, READ, *wanted], ours, url, offline=True)
        print(f"huggingface_hub reads our cache offline: {len(wanted)} files in {Path(place).name}")
        run([*python, DOWNLOAD, *wanted], ours, url, offline=False)
        assert not CONTENT, f"huggingface_hub downloaded again {CONTENT}"
        print("huggingface_hub online downloads nothing again")

        run([*python, DOWNLOAD, *wanted], theirs, url, offline=False)
        CONTENT.clear()
        second = json.loads(run(verify, theirs, url, offline=True))
        third = json.loads(run(verify, theirs, url, offline=False))
        assert not CONTENT, f"cpift-merge downloaded again {CONTENT}"
        assert first["digest"] == second["digest"] == third["digest"], (first, second)
        print(f"cpift-merge reads its cache offline: digest {first['digest'][:16]}, the same")
        a, b = tree(ours), tree(theirs)
        assert a == b, f"ours {a}\ntheirs {b}"
        print(f"both caches have the same {len(a)} blobs, links and refs")

        if all(importlib.util.find_spec(name) for name in ("transformers", "torch")):
            logits = [run([*python, LOGITS], cache, url, offline=True) for cache in (ours, theirs)]
            assert logits[0] == logits[1], logits
            print(f"transformers loads model and tokenizer from both offline: logits {logits[0]}")
        else:
            print("transformers or torch is not installed: not tried")
    versions = run([*python, "import huggingface_hub as h; print(h.__version__)"], Path("/nonexistent"), url, True)
    print(f"huggingface_hub {versions}: all checks passed")


main()
