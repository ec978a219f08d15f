"""A process that has imported torch and foveola, and forks those that tests ask for without another start.

An order is a line of JSON on the standard input: {"words": [script, argument, ...], "folder": path,
"processes": [[environment, file for what it prints, file for its errors], ...]}. The answers are two lines
of JSON: the numbers of the processes at once, their exit codes when all have ended. `run_ranks` in
conftest.py gives the orders.
"""

import atexit
import importlib
import json
import os
import runpy
import sys
import traceback

SLOW = ("torch._dynamo", "torch.utils.tensorboard", "foveola.training.run", "foveola.evaluation.protocol")


def become(words: list[str], folder: str, environment: dict[str, str], out: str, errors: str) -> None:
    """In the forked process: what an interpreter that is started with this script would be."""
    os.setsid()  # a signal to its group reaches its workers, and nobody else
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((0, os.devnull), (1, out), (2, errors)):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    except BaseException:
        traceback.print_exc()
        code = 1
    else:
        code = 0
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # to take thousands of modules apart would take longer than the test


def main() -> None:
    for name in SLOW:
        importlib.import_module(name)
    for line in sys.stdin:
        order = json.loads(line)
        children = []
        for process in order["processes"]:
            if (child := os.fork()) == 0:
                become(order["words"], order["folder"], *process)
            children.append(child)
        print(json.dumps(children), flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
