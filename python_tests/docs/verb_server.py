"""Runs `moeprune` commands in forks of one process that has imported everything, which saves seconds a command.

`moeprune --script FILE` runs a Python script in that way; the real command has no such flag.

`serve(socket path)` runs until it is killed. `CLIENT` is a script that takes the command's place on PATH: it hands its
arguments, its directory and its three streams over, and exits with the command's status.
"""

import contextlib
import importlib
import json
import os
import runpy
import socket
import sys
import tempfile
import traceback

from transformers import AutoTokenizer

from moeprune_ext.checkpoint.load import load
from moeprune_ext.demo.run import demo_folder

CLIENT = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({path!r})
request = json.dumps([sys.argv[1:], os.getcwd(), os.environ.get("EXTRA_FLAGS", "")]).encode()
socket.send_fds(server, [len(request).to_bytes(4, "big") + request], [0, 1, 2])
sys.exit(server.recv(1)[0])
"""


def serve(path: str) -> None:
    """Answers clients one after the other."""
    verbs = ("prune", "calibrate", "score", "search", "allocate", "eep", "export", "eval", "report", "info")
    modules = [*(f"moeprune_ext.cli.{verb}" for verb in verbs), "moeprune_ext.report.report", "matplotlib.figure"]
    for module in [*modules, "matplotlib.backends.backend_svg", "matplotlib.backends.backend_agg"]:
        importlib.import_module(module)
    load(demo_folder()), AutoTokenizer.from_pretrained(demo_folder())  # what transformers imports late
    main = importlib.import_module("moeprune_ext.cli.main").main
    extra_used: set[str] = set()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        while True:
            client, _ = server.accept()
            with client:
                content, streams, _, _ = socket.recv_fds(client, 1 << 16, 3)
                words, folder, extra = json.loads(content[4 : 4 + int.from_bytes(content[:4], "big")])
                if extra and extra not in extra_used:  # "N FLAGS": for the first command of block N
                    extra_used.add(extra)
                    words += extra.split()[1:]
                client.sendall(bytes([_run(main, words, folder, streams)]))
                for stream in streams:
                    os.close(stream)


def _run(main, words, folder, streams) -> int:
    """Runs a command in a child and returns its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255
    status = 1
    with contextlib.suppress(BaseException):
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.chdir(folder)
        sys.argv = words[1:] if words[:1] == ["--script"] else ["moeprune", *words]
        try:
            if words[:1] == ["--script"]:
                tempfile.tempdir = folder
                runpy.run_path(words[1], run_name="__main__")
            else:
                main(words)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1])
