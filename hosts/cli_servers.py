"""The command line's servers and what goes with them: serve, worker, stream, send, health, doctor."""

import os
import signal
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from voxelsigma.hosts.cli_app import app, console

if TYPE_CHECKING:
    from voxelsigma.hosts.listener import Listener

Hosts = Annotated[
    list[str] | None, typer.Option("--host", help="Address to listen on, may be repeated; loopback only by default.")
]
Warmed = Annotated[list[str] | None, typer.Option("-p", "--pipeline", help="Warm its models; may be repeated.")]
Grace = Annotated[float, typer.Option(help="Seconds that running scans get when the server is stopped.", min=0)]
Noise = Annotated[
    Path | None,
    typer.Option(help="Noise scan (ISMRMRD) or stored covariance to use instead of the data's own.", exists=True),
]


@app.command()
def serve(
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.", min=0, max=65535)] = 9002,
    host: Hosts = None,
    pipelines: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of more pipelines; may be repeated.", exists=True, file_okay=False),
    ] = None,
    allow_xml: Annotated[
        bool, typer.Option("--allow-xml", help="Let clients send a pipeline of voxelsigma's gadgets as XML.")
    ] = False,
    idle_timeout: Annotated[
        float, typer.Option(help="Seconds that a client may be silent between messages.", min=1)
    ] = 600.0,
    noise: Noise = None,
    pipeline: Warmed = None,
    grace: Grace = 30.0,
) -> None:
    """Serve MRD clients, as a Gadgetron server would: a pipeline's name, a scan, its images."""
    from voxelsigma.hosts.listener import LOOPBACK, Listener
    from voxelsigma.hosts.server import Policy, Server
    from voxelsigma.hosts.worker import preload

    policy = Policy(folders=tuple(pipelines or ()), allow_xml=allow_xml, idle_seconds=idle_timeout, noise=noise)
    server = Server(policy)
    listener = Listener(host or LOOPBACK, port, server.handle)
    with closing(listener):
        server.tally.models = preload(pipeline or [])
        _run(listener, "serve", grace)


@app.command()
def worker(
    port: Annotated[int, typer.Option(help="Port of <connect port=…>; 0 picks a free one.", min=0, max=65535)] = 18000,
    host: Hosts = None,
    pipeline: Warmed = None,
    grace: Grace = 30.0,
) -> None:
    """Stay resident for a Gadgetron server: gadgets behind its <connect>, models loaded once."""
    from voxelsigma.hosts.listener import LOOPBACK, Listener
    from voxelsigma.hosts.worker import Worker, preload

    resident = Worker()
    listener = Listener(host or LOOPBACK, port, resident.handle)
    with closing(listener):
        resident.tally.models = preload(pipeline or [])
        _run(listener, "worker", grace)


@app.command()
def stream(
    pipeline: Annotated[
        str, typer.Option("-p", "--pipeline", help="Gadgetron XML file, or a shipped pipeline's name.")
    ],
    noise: Noise = None,
) -> None:
    """Run a pipeline between pipes: ISMRMRD stream on standard input, images on standard output."""
    from voxelsigma.hosts.stream import stream as run

    # nothing but the protocol may reach the reader: whatever else prints goes to stderr
    sink = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        run(pipeline, sys.stdin.fileno(), sink, noise=noise)
    except EOFError as error:
        # typer would take it for the end of a dialogue, and say `Aborted!`
        raise ConnectionError(str(error)) from None
    finally:
        os.close(sink)


@app.command()
def send(
    scan: Annotated[Path, typer.Argument(help="ISMRMRD raw data (HDF5).")],
    to: Annotated[str, typer.Option(help="Server, as host:port.")],
    pipeline: Annotated[str, typer.Option("-p", "--pipeline", help="Name of a pipeline that the server knows.")],
    xml: Annotated[bool, typer.Option("--xml", help="Send the pipeline's XML and not its name.")] = False,
    tr: Annotated[float, typer.Option(help="Seconds from one readout to the next; 0 for as fast as it goes.")] = 0.0,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="ISMRMRD image file to write (HDF5).")] = None,
    group: Annotated[str, typer.Option(help="Dataset group of the raw data.")] = "dataset",
    output_group: Annotated[str, typer.Option(help="Dataset group of the images.")] = "dataset",
    timeout: Annotated[float, typer.Option(help="Seconds that the server may be silent after the scan.")] = 60.0,
) -> None:
    """Play a recorded scan to a server at a scanner's pace, and measure the latency of its images."""
    from voxelsigma.hosts.progress import progress_report
    from voxelsigma.hosts.send import report_lines
    from voxelsigma.hosts.send import send as run

    with progress_report(console) as progress:
        report = run(
            scan,
            to,
            pipeline=pipeline,
            send_xml=xml,
            tr=tr,
            group=group,
            output=output,
            output_group=output_group,
            timeout=timeout,
            progress=progress,
        )
    for line in report_lines(report):
        print(line)


@app.command()
def health(
    port: Annotated[int, typer.Option(help="Port of a `serve` or a `worker`.", min=1, max=65535)],
    host: Annotated[str, typer.Option(help="Where it runs.")] = "127.0.0.1",
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the answer.", min=0.1)] = 5.0,
) -> None:
    """Ask a running server how it is; exit code 0 if it answers."""
    from voxelsigma.hosts.health import ask

    for name, value in ask(host, port, timeout).items():
        print(f"{name}: {', '.join(value) or '-' if isinstance(value, list) else value}")


@app.command()
def doctor(
    gadgetron: Annotated[
        bool, typer.Option("--gadgetron", help="Also examine what a Gadgetron server here would start.")
    ] = False,
    python: Annotated[str | None, typer.Option(help="The server's Python; by default the first on its PATH.")] = None,
    path: Annotated[str | None, typer.Option(help="The server's PATH; by default this one.")] = None,
    pid: Annotated[int | None, typer.Option(help="A running server, whose environment is examined.")] = None,
    worker_port: Annotated[
        int | None, typer.Option("--worker", help="Port at which a worker should be listening.")
    ] = None,
) -> None:
    """Check this installation; exit code 1 if anything is wrong."""
    from voxelsigma.hosts.check import failed, lines
    from voxelsigma.hosts.doctor import doctor as run

    checks = run(gadgetron=gadgetron, python=python, path=path, pid=pid, worker=worker_port)
    for line in lines(checks):
        print(line)
    if failed(checks):
        sys.exit(1)


def _run(listener: "Listener", name: str, grace: float) -> None:
    """Run a server until a signal stops it; a second signal ends it at once."""

    def stop(number: int, frame: object) -> None:
        del frame
        if listener.stopping:
            os._exit(128 + number)
        listener.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    print(f"{name}: listening on {', '.join(listener.addresses)}", flush=True)
    listener.run(grace)
    print(f"{name}: stopped", flush=True)
    if listener.connections:
        # threads inside a computation would crash the interpreter on its way out
        os._exit(1)
