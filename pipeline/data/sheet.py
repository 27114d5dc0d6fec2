"""Contact sheets: clips as strips of frames with their texts, several of them as one picture.

Responsible for pictures alone; nothing here scores. Drawn with Pillow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cluster.harmless import printable
from pipeline.data.fonts import font_for
from rewards.similarity import resample_frames

INK, SOFT, PAPER, CARD, LINE = "#16202c", "#5c6b7a", "#ffffff", "#f5f7f9", "#dfe5ea"
ACCENTS = ("#7b8794", "#2f9e6e", "#3267d6", "#d9730d", "#a33fb5", "#c0392b", "#0f8a9d")
"""Colours of the bars beside a card's strips: input, ground truth, then the systems in turn."""

LABEL_WIDTH, GAP, PAD, MARGIN = 250, 4, 14, 20
THUMB_HEIGHT, MAX_STRIP_WIDTH, MAX_FRAMES = 84, 904, 9
MAX_TEXT = 600  # characters of a question, caption or note: the sheet is for looking, the table has all of it
_PIXEL_ART = 64  # frames smaller than this are enlarged without blurring


@dataclass(frozen=True, eq=False)
class Strip:
    """A clip with its text: the first line of ``label`` is the name, the rest the caption; ``note`` is small print."""

    label: str
    frames: np.ndarray | None  # uint8 (T, H, W, 3); None: there is no video
    note: str = ""


def contact_sheet(rows: Sequence[tuple[str, Sequence[Strip]]], path: Path, *, title: str = "") -> Path:
    """Write a PNG with one card per row, (question, strips), and return ``path``.

    Strips of a card stand under one another, so that equal times align; long clips are thinned to 9 frames at most,
    evenly. Raises ValueError for no rows or a row without strips.
    """
    if not rows or any(not strips for _, strips in rows):
        raise ValueError("a contact sheet needs at least one row, and each row at least one strip")
    cards = [_card(heading, strips) for heading, strips in rows]
    width = max(card.width for card in cards)
    columns = 2 if len(cards) > 3 and width <= 1250 else 1
    ranks = [cards[i : i + columns] for i in range(0, len(cards), columns)]
    top = MARGIN + (44 if title else 0)
    heights = [max(card.height for card in rank) for rank in ranks]
    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, top + sum(h + MARGIN for h in heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((MARGIN, MARGIN - 2), _one_line(title), font=font_for(title, 22, bold=True), fill=INK)
    y = top
    for rank, height in zip(ranks, heights):
        for column, card in enumerate(rank):
            x = MARGIN + column * (width + MARGIN)
            draw.rounded_rectangle((x, y, x + width - 1, y + height - 1), 10, fill=CARD, outline=LINE)
            sheet.paste(card, (x, y), _rounded(card.size))
        y += height + MARGIN
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG", optimize=True)
    return path


def _card(heading: str, strips: Sequence[Strip]) -> Image.Image:
    """Draw one question with its strips."""
    pictures = [None if s.frames is None else _filmstrip(s.frames) for s in strips]
    film = max((p.width for p in pictures if p is not None), default=400)
    texts = [_label(s) for s in strips]
    heights = [max(THUMB_HEIGHT if p is None else p.height, t.height) for p, t in zip(pictures, texts)]
    width = PAD + 8 + LABEL_WIDTH + film + PAD
    bold = font_for(heading, 16, bold=True)
    lines = _wrapped(heading, bold, width - 2 * PAD)
    top = PAD + 22 * len(lines) + 8
    card = Image.new("RGB", (width, top + sum(h + 10 for h in heights) + PAD - 10), CARD)
    draw = ImageDraw.Draw(card)
    for i, line in enumerate(lines):
        draw.text((PAD, PAD - 3 + 22 * i), line, font=bold, fill=INK)
    y = top
    for i, (picture, text, height) in enumerate(zip(pictures, texts, heights)):
        accent = ACCENTS[i] if i < len(ACCENTS) else ACCENTS[2 + (i - 2) % (len(ACCENTS) - 2)]
        draw.rounded_rectangle((PAD, y, PAD + 3, y + height - 1), 2, fill=accent)
        card.paste(text, (PAD + 12, y))
        if picture is None:
            box = (PAD + 8 + LABEL_WIDTH, y, width - PAD - 1, y + height - 1)
            draw.rounded_rectangle(box, 6, outline=LINE)
            draw.text((box[0] + 14, y + height // 2), "no video", font=font_for("no video", 13), fill=SOFT, anchor="lm")
        else:
            card.paste(picture, (PAD + 8 + LABEL_WIDTH, y))
        y += height + 10
    return card


def _label(strip: Strip) -> Image.Image:
    """Draw a strip's name, caption and note, wrapped to the label column."""
    name, _, caption = strip.label.partition("\n")
    width = LABEL_WIDTH - 24
    runs = [
        (_wrapped(text, font, width), font, colour, step)
        for text, font, colour, step in (
            (name, font_for(name, 13, bold=True), SOFT, 18),
            (caption, font_for(caption, 14), INK, 19),
            (strip.note, font_for(strip.note, 11), SOFT, 15),
        )
    ]
    image = Image.new("RGB", (width, sum(len(lines) * step for lines, _, _, step in runs) + 2), CARD)
    draw, y = ImageDraw.Draw(image), 0
    for lines, font, colour, step in runs:
        for line in lines:
            draw.text((0, y), line, font=font, fill=colour)
            y += step
    return image


def _filmstrip(frames: np.ndarray) -> Image.Image:
    """Draw at most 9 evenly spaced frames side by side, all of one height."""
    height, width = frames.shape[1:3]
    scale = THUMB_HEIGHT / height
    if height <= _PIXEL_ART:
        scale = float(max(1, round(scale)))
    most = max(2, int(MAX_STRIP_WIDTH // (width * scale + GAP)))
    shown = resample_frames(frames, min(len(frames), MAX_FRAMES, most))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    method = Image.Resampling.NEAREST if height <= _PIXEL_ART else Image.Resampling.LANCZOS
    film = Image.new("RGB", (len(shown) * (size[0] + GAP) - GAP, size[1]), CARD)
    for i, frame in enumerate(shown):
        film.paste(Image.fromarray(np.ascontiguousarray(frame)).resize(size, method), (i * (size[0] + GAP), 0))
    return film


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Return ``text`` in lines no wider than ``width`` pixels; a word that is wider is broken, a longer text cut."""
    lines: list[str] = []
    for paragraph in printable(text, MAX_TEXT).splitlines():
        line = ""
        for word in paragraph.split():
            while font.getlength(word) > width:
                cut = next(
                    i for i in range(min(len(word), width), 0, -1) if i == 1 or font.getlength(word[:i]) <= width
                )
                lines += [line] if line else []
                lines.append(word[:cut])
                line, word = "", word[cut:]
            longer = f"{line} {word}".strip()
            if font.getlength(longer) <= width:
                line = longer
            else:
                lines.append(line)
                line = word
        lines += [line] if line else []
    return lines


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()), 200)


def _rounded(size: tuple[int, int]) -> Image.Image:
    """Return a mask that leaves the card's drawn border alone."""
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rounded_rectangle((1, 1, size[0] - 2, size[1] - 2), 10, fill=255)
    return mask
