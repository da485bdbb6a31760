"""JSON: one object a line, a list of objects, Karpathy's splits, COCO's annotations."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from retrieval.errors import DataError
from retrieval.pair_formats.rows import IMAGE_NAMES, LABEL_KEYS, TEXT_KEYS, Row, Rows, places, some, take, take_split


def is_json(file: Path, text: str) -> bool:
    """Whether a text is JSON, by its first character or by the name of its file."""
    return text.lstrip()[0] in "{[" or file.suffix.lower() in (".json", ".jsonl", ".ndjson")


def read_json(file: Path, text: str, pictured: bool = True, bare: bool = False) -> Rows:
    """A document, or one object a line: JSONL is what goes on behind its first value.

    Not ``pictured``: an object may name no picture if it has a sentence; its image is then "". ``bare``: it may have
    neither, or nothing but null or "" in their places.
    """
    try:
        document, end = json.JSONDecoder().raw_decode(text, len(text) - len(text.lstrip()))
    except (ValueError, RecursionError) as error:
        if file.suffix.lower() == ".json":
            raise DataError(f"{file} is not JSON, or only its beginning: {error}") from error
        return _json_lines(file, text, pictured, bare)
    if not re.compile(r"\s*\Z").match(text, end):
        return _json_lines(file, text, pictured, bare)
    if isinstance(document, list):
        objects = enumerate(document, 1)
        rows = [_object_row(fields, file, "entry", number, pictured, bare) for number, fields in objects]
        return Rows(rows, places(file))
    if isinstance(document, dict) and "images" in document:
        return (_coco if "annotations" in document else _karpathy)(file, document)
    return Rows([_object_row(document, file, "line", 1, pictured, bare)], places(file))


def _json_lines(file: Path, text: str, pictured: bool, bare: bool) -> Rows:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand inside a JSON string
        if line.strip():
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file}, line {number} is not JSON: {error}") from error
            rows.append(_object_row(fields, file, "line", number, pictured, bare))
    return Rows(rows, places(file))


def _object_row(fields: object, file: Path, unit: str, number: int, pictured: bool, bare: bool) -> Row:
    if isinstance(fields, dict):
        rest = dict(fields)
        image = rest.pop(next((name for name in IMAGE_NAMES if name in rest), ""), None)
        if isinstance(image, str) and image:
            return Row(image, take(rest, TEXT_KEYS), take(rest, LABEL_KEYS), take_split(rest), rest)
        if not pictured and image is None and (texts := take(rest, TEXT_KEYS)):
            return Row("", texts, take(rest, LABEL_KEYS), take_split(rest), rest)
        if bare and image in (None, ""):
            return Row("", take(rest, TEXT_KEYS), take(rest, LABEL_KEYS), take_split(rest), rest)
    raise DataError(f'{file}, {unit} {number}: expected an object with "image", as {{"image": "a.jpg", …}}')


def _entries(file: Path, document: dict[str, Any], key: str, **kinds: type | tuple[type, ...]) -> list[dict[str, Any]]:
    """The objects of one of a document's lists, each with the given fields."""
    entries = document[key]
    if not isinstance(entries, list):
        raise DataError(f'{file}: expected a list at "{key}"')
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(name), kind) for name, kind in kinds.items()):
            names = " and ".join(f'"{name}"' for name in kinds)
            raise DataError(f"{file}, {key}[{number}]: expected an object with {names}")
    return entries


def _karpathy(file: Path, document: dict[str, Any]) -> Rows:
    """Karpathy's splits of Flickr8k, Flickr30k and COCO (cs.stanford.edu/people/karpathy/deepimagesent)."""
    rows = []
    for number, entry in enumerate(_entries(file, document, "images", filename=str, sentences=list)):
        rest = dict(entry)
        name, folder, sentences = rest.pop("filename"), rest.pop("filepath", None), rest.pop("sentences")
        if not name or not all(isinstance(s, dict) and isinstance(s.get("raw"), str) for s in sentences):
            raise DataError(f'{file}, images[{number}]: expected a "filename", and sentences with "raw"')
        image = f"{folder}/{name}" if folder else name
        rows.append(Row(image, tuple(s["raw"] for s in sentences), (), take_split(rest), rest))
    return Rows(rows, places(file, "..", "../images"), droppable=True)


_COCO_PART = re.compile(r"(train|val|test)20\d\d")


def _coco(file: Path, document: dict[str, Any]) -> Rows:
    """Captions or instances of COCO (cocodataset.org/#format-data); split and folder are told by the file's name."""
    images = _entries(file, document, "images", id=(int, str), file_name=str)
    categories = {}
    if "categories" in document:
        kinds = _entries(file, document, "categories", id=(int, str), name=str)
        categories = {kind["id"]: kind["name"] for kind in kinds}
    texts: dict[int | str, list[str]] = {image["id"]: [] for image in images}
    if len(texts) < len(images):
        raise DataError(f"{file}: {len(images) - len(texts)} of its images have the id of another one")
    labels: dict[int | str, dict[str, None]] = {key: {} for key in texts}  # an ordered set
    lost = []
    for number, entry in enumerate(_entries(file, document, "annotations", image_id=(int, str))):
        owner, caption, category = entry["image_id"], entry.get("caption"), entry.get("category_id")
        if owner not in texts:
            lost.append(owner)
        elif isinstance(caption, str):
            texts[owner].append(caption)
        elif isinstance(category, (int, str)) and category in categories:
            labels[owner][categories[category]] = None
        else:
            raise DataError(f'{file}, annotations[{number}]: expected "caption", or "category_id" of its categories')
    if lost:
        ids = some(list(dict.fromkeys(lost)))
        raise DataError(f"{len(lost)} annotations of {file} are of images that it does not list: ids {ids}")
    part = _COCO_PART.search(file.name)
    rows = []
    for number, image in enumerate(images):
        rest = dict(image)
        name = rest.pop("file_name")
        if not name:
            raise DataError(f'{file}, images[{number}]: "file_name" is empty')
        split = take_split(rest) or (part and part[1])
        rows.append(Row(name, tuple(texts[image["id"]]), tuple(labels[image["id"]]), split, rest))
    more = (part[0], f"images/{part[0]}", f"../{part[0]}", f"../images/{part[0]}") if part else ()
    return Rows(rows, places(file, *more, "..", "../images"))
