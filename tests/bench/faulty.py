"""What a mechanism of a caller's own may do to its process. Workers import this file by its name.

python -c "import faulty; faulty.main()"      does the fault that its job names, in a worker as it is
faulty:Faulty(fault="exits", at=5)            a mechanism that does it at a call
"""

import contextlib
import ctypes
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

from regard.bench.worker import main as worker


def raises():
    raise RuntimeError("boom <b>\x1b[31mred\x1b[0m\n second line")


def raises_no_error():
    raise GeneratorExit


def says_nothing_readable():
    class Mute(Exception):
        def __str__(self):
            raise ValueError

    raise Mute


def says_too_much():
    raise RuntimeError("e" * 5_000_000)


def says_half_letters():
    raise RuntimeError("\udc80 half \ud800")


def exits_by_exception():
    sys.exit(0)


def exits():
    os._exit(7)


def exits_well():
    os._exit(0)


def segfaults():
    ctypes.string_at(0)


def aborts():
    os.abort()


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def interrupted():
    os.kill(os.getpid(), signal.SIGINT)


def kills_its_group():
    os.killpg(0, signal.SIGKILL)


def sleeps():
    time.sleep(10_000)


def spins_in_c():
    re.match(r"(a+)+$", "a" * 60 + "b")


def stops():
    os.kill(os.getpid(), signal.SIGSTOP)


def eats_memory():
    bytearray(1 << 60)


def recurses():
    recurses()


def closes_descriptors():
    os.closerange(0, 20_000)


def forks_and_exits():
    _child(lambda: None)
    os._exit(3)


def fills_a_disk():
    raise OSError(28, "No space left on device", "mine.bin")


# --- what is no fault of the cell: it goes on to its result


def ignores_signals():
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)


def prints():
    print("x" * 1000, flush=True)
    sys.stderr.write("y" * 300_000)
    os.write(1, b"z" * 200_000)
    subprocess.run(["echo", "from a program"], check=True)


def asks():
    try:
        input()
    except EOFError:
        return
    raise AssertionError("something was there to be read")


def writes_everywhere():
    for descriptor in range(3, 1000):
        with contextlib.suppress(OSError):
            os.write(descriptor, b'{"result": {"forged": true}}\n')


def leaves_threads():
    for _ in range(3):
        threading.Thread(target=time.sleep, args=(10_000,)).start()


def leaves_a_child():
    _child(lambda: None)


def leaves_a_session():
    _child(os.setsid)


def goes_on_twice():
    os.fork()


def changes_the_world():
    os.chdir("/")
    os.umask(0o777)
    os.environ.clear()
    sys.path.clear()
    random.seed(0)
    sys.stdout = sys.stderr = None


def _child(first):
    if os.fork() == 0:
        first()
        time.sleep(10_000)


def do(job, progress):
    progress(1, 8.0)
    globals()[job["fault"]]()
    progress(2, 7.0)
    return {"fine": True}


def main():
    worker(do)
