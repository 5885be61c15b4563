"""The packaged demo: what it claims of its splits, licences, sizes and model."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from clipfreeze import demo
from clipfreeze.policy.loading import load_policy

FOLDER = Path(demo.__file__).parent


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


@pytest.mark.parametrize("style", demo.STYLES)
def test_no_family_and_no_picture_is_on_two_sides_of_a_style(style: str) -> None:
    family_split: dict[str, str] = {}
    image_split: dict[bytes, str] = {}
    for split in demo.SPLITS:
        for picture in demo.load_pictures(style, split):
            assert family_split.setdefault(picture.family, split) == split, picture.name
            assert image_split.setdefault(picture.image, split) == split, picture.name


def test_what_one_pretraining_style_holds_out_the_others_show() -> None:
    trained = {style: demo.load_pictures(style, "train") for style in demo.PRETRAIN_STYLES}
    images = {picture.image for pictures in trained.values() for picture in pictures}
    for style in demo.PRETRAIN_STYLES:
        shown = {picture.code for other in demo.PRETRAIN_STYLES if other != style for picture in trained[other]}
        for split in ("val", "test"):
            pictures = demo.load_pictures(style, split)
            assert {picture.code for picture in pictures} <= shown
            assert not {picture.image for picture in pictures} & images


def test_both_openmoji_styles_hold_out_the_same_concepts() -> None:
    for split in demo.SPLITS:
        colour, black = (demo.load_pictures(style, split) for style in ("openmoji", "openmoji_black"))
        assert {picture.code for picture in colour} == {picture.code for picture in black}


@pytest.mark.parametrize("style", demo.STYLES)
def test_each_style_has_pictures_and_captions(style: str) -> None:
    pictures = demo.load_pictures(style)
    assert len(pictures) == sum(len(demo.load_pictures(style, split)) for split in demo.SPLITS) > 1400
    assert len({picture.code for picture in pictures}) == len({picture.name for picture in pictures}) == len(pictures)
    assert all(picture.captions[0] == picture.name for picture in pictures)
    with Image.open(io.BytesIO(pictures[0].image)) as image:
        assert (image.size, image.mode) == ((64, 64), "RGB")


@pytest.mark.parametrize(
    ("style", "maker", "spdx", "words_of_the_licence"),
    [
        ("noto", "Google", "Apache-2.0", "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION"),
        ("twemoji", "Twitter", "CC-BY-4.0", "Creative Commons Attribution 4.0 International Public License"),
        ("fluent", "Microsoft", "MIT", "The above copyright notice and this permission notice"),
        ("openmoji", "OpenMoji", "CC-BY-SA-4.0", "Attribution-ShareAlike 4.0 International Public"),
        ("openmoji_black", "OpenMoji", "CC-BY-SA-4.0", "Attribution-ShareAlike 4.0 International Public"),
    ],
)
def test_each_style_names_its_maker_and_licence(style: str, maker: str, spdx: str, words_of_the_licence: str) -> None:
    text = (FOLDER / "pictures" / f"{style}.LICENSE.txt").read_text(encoding="utf-8")
    notice, licence = text.split("=" * 100, 1)
    assert maker in notice
    assert "Source: npm package" in notice
    assert f"Licence: {spdx}, in full below" in notice
    assert "Changes made:" in notice
    assert words_of_the_licence in licence


def test_nothing_is_packaged_without_a_notice() -> None:
    assert {path.stem for path in FOLDER.rglob("*.parquet")} == set(demo.STYLES)
    words = (FOLDER / "pictures" / "captions.LICENSE.txt").read_text(encoding="utf-8")
    assert all(source in words for source in ("unicode-emoji-json", "emojilib", "Unicode CLDR"))
    model = (FOLDER / "model" / "NOTICE.txt").read_text(encoding="utf-8")
    assert all(style in model for style in demo.PRETRAIN_STYLES)


def test_share_alike_art_is_in_files_of_its_own() -> None:
    share_alike = {
        style
        for style in demo.STYLES
        if "CC-BY-SA-4.0" in (FOLDER / "pictures" / f"{style}.LICENSE.txt").read_text(encoding="utf-8")
    }
    assert share_alike == {"openmoji", "openmoji_black"}
    assert not share_alike & set(demo.PRETRAIN_STYLES)


def test_an_unknown_style_or_split_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="openmoji_black"):
        demo.load_pictures("apple")
    with pytest.raises(ValueError, match="train, val, test"):
        demo.load_pictures("noto", "dev")


def test_the_package_data_stays_small() -> None:
    assert megabytes(FOLDER / "pictures") < 10
    assert megabytes(FOLDER) < 27


@pytest.mark.parametrize("policy", demo.KNOBS)
def test_the_rates_are_knobs_of_their_policy(policy: str) -> None:
    load_policy(policy, **demo.KNOBS[policy])


def test_import_needs_no_torch() -> None:
    code = "import sys, clipfreeze.demo; sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_open_clip_loads_the_model_which_names_unseen_pictures() -> None:
    import open_clip
    import torch

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{demo.model_dir()}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{demo.model_dir()}")
    model.eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for style in demo.PRETRAIN_STYLES:
        pictures = demo.load_pictures(style, "test")
        images = torch.stack([transform(Image.open(io.BytesIO(picture.image))) for picture in pictures])
        with torch.no_grad():
            classes = model.encode_text(tokenizer([picture.name for picture in pictures]), normalize=True)
            logits = model.encode_image(images, normalize=True) @ classes.T
        top1 = (logits.argmax(1) == torch.arange(len(pictures))).float().mean()
        assert top1 > 30 / len(pictures), style  # thirty times chance
