"""Externals written with nothing but the stock `gadgetron` package, as its users write them."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any


def passes(connection: Any) -> None:
    """Sends every item on."""
    for item in connection:
        connection.send(item)


def raises_mid_stream(connection: Any) -> None:
    for number, item in enumerate(connection):
        if number == 3:
            raise ValueError("no chocolate left")
        connection.send(item)


def raises_at_once(connection: Any) -> None:
    for _ in connection:
        raise ValueError("no chocolate at all")


def raises_at_the_end(connection: Any) -> None:
    passes(connection)
    raise ValueError("no chocolate for you")


def exits(connection: Any) -> None:
    connection.send(next(connection)[1])
    sys.exit(3)


def returns_early(connection: Any) -> None:
    connection.send(next(connection)[1])


def is_killed(connection: Any) -> None:
    connection.send(next(connection)[1])
    os.kill(os.getpid(), signal.SIGKILL)


def tidies_up(connection: Any) -> None:
    """Says goodbye, then takes a second to leave."""
    passes(connection)
    connection.socket.write(b"\x04\x00")
    time.sleep(1)
    os._exit(0)


def drains_again(connection: Any) -> None:
    """Says goodbye after the end of its input, then waits for another end."""
    passes(connection)
    connection.socket.write(b"\x04\x00")
    print("drains again", flush=True)
    while connection.socket.socket.recv(2**16):
        pass
    os._exit(0)


def writes_down(connection: Any) -> None:
    """Leaves behind what it was given."""
    found = {
        "arguments": sys.argv,
        "folder": str(Path.cwd()),
        "storage": os.environ.get("GADGETRON_STORAGE_ADDRESS"),
        "path": os.environ.get("PYTHONPATH"),
        "configuration": connection.raw_bytes.config.decode(),
        "header": connection.raw_bytes.header.decode(),
        "items": [type(item).__name__ for item in connection],
    }
    Path(os.environ["TOYS_FILE"]).write_text(json.dumps(found))
    print("written to stdout", flush=True)


def leaves_a_child(connection: Any) -> None:
    """Starts a process that outlives it."""
    passes(connection)
    subprocess.Popen(["sleep", "60"])


def passes_with_a_reader(connection: Any) -> None:
    """Reads on a thread whatever becomes of its output; leaves when nobody takes that."""
    items: SimpleQueue[Any] = SimpleQueue()

    def read() -> None:
        for item in connection:
            items.put(item)
        items.put(None)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        while (item := items.get()) is not None:
            connection.send(item)
    except OSError:
        os._exit(1)
