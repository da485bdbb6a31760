"""The demo: a folder of photos becomes searchable, and a page shows what was found.

make demo                  about 20 photos that scikit-image and scikit-learn ship
make demo DIR=~/Pictures   your own; their index stays in that folder, so the next run is quick
"""

from __future__ import annotations

import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from indexes.errors import StoreNotFound
from retrieval.library import Library
from retrieval.report import write_results_page

OUT = Path("demo-out")
QUERIES = ("a cat", "a cup of coffee", "a rocket launching into the sky", "an astronaut in an orange suit")
OWN_QUERIES = ("people smiling", "a dog", "the sea", "food on a table")
_SHIPPED = {
    "skimage/data": "astronaut.png brick.png camera.png cell.png chelsea.png clock_motion.png coffee.png "
    "coins.png grass.png gravel.png hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png page.png "
    "retina.jpg rocket.jpg text.png",
    "sklearn/datasets/images": "china.jpg flower.jpg",
}


def shipped_photos(folder: Path) -> Path:
    """Copy the photos out of the two packages, neither of which is imported."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, names in _SHIPPED.items():
        package, _, rest = place.partition("/")
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            sys.exit(f"{package} is not installed: run this through  make demo")
        for name in names.split():
            shutil.copyfile(Path(spec.origin).parent / rest / name, folder / name)
    return folder


def main() -> None:
    own = Path(sys.argv[1]).expanduser() if len(sys.argv) > 1 else None
    folder = own or shipped_photos(OUT / "photos")
    start = time.perf_counter()
    try:
        library = Library.open(folder)
    except StoreNotFound:
        library = Library.create(folder)
    report = library.index(library.below(folder))
    print(
        f"indexed {folder}: {report.added} added, {report.skipped} known, {len(report.failures)} unreadable, "
        f"{time.perf_counter() - start:.1f} s"
    )
    results = []
    for query in OWN_QUERIES if own else QUERIES:
        start = time.perf_counter()
        matches = library.search(query, k=6, below=library.below(folder))
        results.append((query, matches))
        print(f"\n{query}  ({1000 * (time.perf_counter() - start):.0f} ms)")
        for match in matches[:3]:
            print(f"  {match.score:.3f}  {match.path}")
    OUT.mkdir(exist_ok=True)
    page = write_results_page(results, OUT / "index.html")
    print(f"\nlook at {page}")


if __name__ == "__main__":
    main()
