"""A double of a Gadgetron 4.7 server, as far as its external nodes can tell.

It starts externals, or connects to them, as the server does, feeds them without back-pressure and fails as it fails.
Native gadgets it has none: those at the start of a pipeline can be replaced by a recording of what they sent.
Where the server's behaviour hangs on a race, the double always takes the side that is worse for the node.

>>> from tests.gadgetron_double import Double, acquisitions, client, execute, pipeline
>>> chain = execute("voxelsigma.gadgets.chain", configuration='<gadget name="prewhiten"/> ...')
>>> with Double(pipeline(chain), {"OMP_NUM_THREADS": "1"}, log=tmp_path / "log.txt") as double:
...     found = client(double.port, "any_name.xml", scan.header_xml, acquisitions(scan.blocks))
...     assert (found.closed, found.texts, len(found.images)) == (True, [], 3), double.log_text
...     assert double.leftovers() == []
...     assert double.exit_codes == [("voxelsigma.gadgets.chain.gadget", 0)]

A listening external is `connect(port)`, of a worker or of a `Listener` in the test itself. A scan behind C++ gadgets
needs `front_end=` (a recording). Messages of a client are an iterable of bytes that may sleep, break off in the middle
of a message, or raise `Vanish`. Leaving the `with` block kills what still runs and fails if anything stays behind;
`Stage` does it at the end of a test.
"""

from tests.gadgetron_double import framing
from tests.gadgetron_double.client import (
    Received,
    Vanish,
    acquisitions,
    client,
    image_message,
    image_of,
    samples_of,
)
from tests.gadgetron_double.framing import Message, messages_of
from tests.gadgetron_double.listener import Listener, Peer
from tests.gadgetron_double.pipeline import connect, execute, parse_pipeline, pipeline, reserialised
from tests.gadgetron_double.server import Double
from tests.gadgetron_double.stage import TOYS, Stage

__all__ = [
    "TOYS",
    "Double",
    "Listener",
    "Message",
    "Peer",
    "Received",
    "Stage",
    "Vanish",
    "acquisitions",
    "client",
    "connect",
    "execute",
    "framing",
    "image_message",
    "image_of",
    "messages_of",
    "parse_pipeline",
    "pipeline",
    "reserialised",
    "samples_of",
]
