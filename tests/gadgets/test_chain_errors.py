"""Chains that cannot work say so in one line."""

from typing import Any

import pytest

from voxelsigma.formats.simulate import SimulatedScan, Simulation, simulate
from voxelsigma.models.cards import available_cards

FRONT: tuple[tuple[str, dict[str, str]], ...] = (("prewhiten", {}), ("accumulate", {}), ("coil_maps", {"kernel": "4"}))


@pytest.mark.parametrize(
    ("gadgets", "text"),
    [
        (
            [("accumulate", {}), ("coil_maps", {"kernel": "4"}), ("reconstruct", {}), ("sketch", {})],
            "were not whitened",
        ),
        ([*FRONT[:2], ("reconstruct", {})], "no coil sensitivities came for slice 0; put 'coil_maps'"),
        ([("sketch", {"probes": "1"})], "sketch: property 'probes' must be an integer from 2 to 65536, got '1'"),
        ([("sketch", {"probes": "many"})], "property 'probes' must be an integer"),
        ([("sketch", {"chocolate": "1"})], "sketch: unknown property 'chocolate'; known are"),
        ([("sketch", {"maps": "magnitude beauty"})], "property 'maps' must be any of magnitude, complex"),
        ([("sketch", {"seed": "1", "time_budget": "1"})], "cannot go with 'seed'"),
        ([("accumulate", {"prewhitened": "maybe"})], "property 'prewhitened' must be true or false, got 'maybe'"),
        ([("coil_maps", {"method": "magic"})], "property 'method' must be one of espirit, walsh, got 'magic'"),
        ([("coil_maps", {"crop": "nan"})], "property 'crop' must be a number from 0 to 1, got 'nan'"),
        (
            [("reconstruct", {"model": "gpt"})],
            f"no model card is called 'gpt'; shipped are {', '.join(available_cards())}$",
        ),
        (
            [("reconstruct", {"model": "unrolled_small", "regularization": "1"})],
            "a trained network and takes none",
        ),
        ([("reconstruct", {"model": " "})], "property 'model' must be a text that is not empty"),
        ([("teleport", {})], "no gadget is called 'teleport'; known are prewhiten, accumulate"),
        ([], "lists no gadget"),
    ],
)
def test_bad_chains_are_refused(scan: SimulatedScan, run: Any, gadgets: Any, text: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        run(scan.header_xml, scan.blocks, *gadgets)


def test_exact_where_there_is_no_exact_map_is_refused(scan: SimulatedScan, run: Any) -> None:
    with pytest.raises(ValueError, match="'unrolled_small' on this sampling has no cheap exact map"):
        run(
            scan.header_xml,
            scan.blocks,
            *FRONT,
            ("reconstruct", {"model": "unrolled_small"}),
            ("sketch", {"estimator": "exact"}),
        )


def test_no_reference_lines_are_refused(run: Any) -> None:
    scan = simulate(Simulation(matrix=(1, 32, 32), coils=4, acceleration=2, mask="uniform_1d", reference_lines=0))
    with pytest.raises(ValueError, match="slice 0 has no reference lines, and only 1 fully sampled"):
        run(scan.header_xml, scan.blocks, *FRONT)
