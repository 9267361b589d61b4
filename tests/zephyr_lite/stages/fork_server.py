"""A process that has imported everything and forks a child per command line, read from stdin.

Request  {"argv": [...], "env": {...}, "log": FILE,
          "without": [...]}: packages to hide         answer {"pid": N}
Request  {"wait": N}                                  answer {"status": N}: exit code, or -signal

No torch operation runs before the fork, so no OpenMP thread is lost in it.
"""

from __future__ import annotations

import json
import os
import sys
import traceback


def serve() -> None:
    """Import, say so, then answer requests until stdin ends."""
    import transformers.models.mistral.modeling_mistral  # noqa: F401
    import xllamacpp  # noqa: F401

    from zephyr_lite import cli
    from zephyr_lite.stages import aif, dpo, export, sft  # noqa: F401

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _run(cli.main, request)
        print(json.dumps({"pid": pid}), flush=True)


def _run(main: object, request: dict) -> None:
    """The child: never returns."""
    with open(request["log"], "a", buffering=1) as handle:
        os.dup2(handle.fileno(), 1)
        os.dup2(handle.fileno(), 2)
    os.environ.update(request["env"])
    sys.modules.update(dict.fromkeys(request.get("without", ())))  # None: cannot be imported
    import torch

    torch.set_num_threads(1)  # the thread count changes rounding; equality is asked for
    status = 0
    try:
        main(request["argv"])  # type: ignore[operator]
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()
