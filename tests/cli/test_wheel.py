"""An installed wheel is enough for `foreroute demo`: the model is in it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_wheel_carries_the_demos_model(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    script = "from foreroute.cli.commands import demo; print(demo.find_model())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    found = Path(done.stdout.strip())
    assert found == tmp_path / "installed" / "foreroute" / "models" / "foreroute-tiny"
    # These alone: nothing that a fit or a pack has left beside them.
    assert {path.name for path in found.iterdir()} == {
        "README.md", "config.json", "curves.png", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (found / file).read_bytes() == (ROOT / "models" / "foreroute-tiny" / file).read_bytes()
