"""A process that has imported everything once, and forks: each fault gets a real process without seconds of imports.

Reads one JSON request a line. `{"start": name, "args": {…}, "log": path}` answers with a process id; `{"wait": pid,
"timeout": s}` with its exit status, negative for a signal, or null if it still runs.
"""

import json
import os
import signal
import sys
import time
import traceback

import workload


def child(name: str, args: dict, log: str) -> None:
    code = 70
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        code = getattr(workload, name)(**args) or 0
        sys.stdout.flush()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, timeout: float) -> int | None:
    end = time.monotonic() + timeout
    while True:
        done, code = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(code)
        if time.monotonic() > end:
            return None
        time.sleep(0.002)


def main() -> None:
    workload.warm_up()
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if not pid:
                child(request["start"], request["args"], request["log"])
            answer = pid
        else:
            answer = wait(request["wait"], request["timeout"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
