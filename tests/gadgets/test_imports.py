"""What gadgets import, and when."""

import subprocess
import sys

import pytest


def test_whitening_and_accumulation_never_import_torch() -> None:
    program = (
        "import sys\n"
        "from voxelsigma.gadgets.registry import create\n"
        "from voxelsigma.gadgets.context import Context\n"
        "from voxelsigma.formats.header import parse_header\n"
        "from voxelsigma.formats.simulate import Simulation, simulate\n"
        "scan = simulate(Simulation(matrix=(1, 32, 32), coils=4, acceleration=2, mask='uniform_1d',\n"
        "    reference_lines=8))\n"
        "context = Context(header=parse_header(scan.header_xml))\n"
        "items = create('prewhiten', {'forward': 'covariance'}, context)(iter(scan.blocks))\n"
        "(kspace,) = create('accumulate', {}, context)(items)\n"
        "assert kspace.whitening is not None\n"
        "import voxelsigma.gadgets.external, voxelsigma.gadgets.prewhiten, voxelsigma.gadgets.accumulate\n"
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["prewhiten", "accumulate", "coil_maps", "reconstruct", "sketch", "chain"])
def test_gadget_modules_import_the_standard_library_only(name: str) -> None:
    program = (
        f"import sys, voxelsigma.gadgets.{name} as module\n"
        "assert callable(module.gadget)\n"
        "heavy = {'numpy', 'torch', 'ismrmrd', 'gadgetron', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'{heavy} imported' if heavy else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
