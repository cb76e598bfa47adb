"""Frontal faces in a picture, found by the cascade that OpenCV brings (Viola and Jones 2001; Lienhart 2002)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL import Image

CASCADE = "haarcascade_frontalface_alt2.xml"
SMALLEST = 24  # pixels a side; the cascade was trained on 20
_NEIGHBOURS = 5  # overlapping hits that make a face: fewer find more, and more that is none


class Box(NamedTuple):
    """Pixels: the left upper corner and the size."""

    left: int
    top: int
    width: int
    height: int


def find(image: Image.Image) -> list[Box]:
    """The faces, largest first. Profiles and faces that lie on their side are not found."""
    import cv2
    import numpy as np
    from cv2.data import haarcascades

    cascade = cv2.CascadeClassifier(haarcascades + CASCADE)
    grey = cv2.equalizeHist(np.array(image.convert("L")))
    found = cascade.detectMultiScale(grey, scaleFactor=1.1, minNeighbors=_NEIGHBOURS, minSize=(SMALLEST, SMALLEST))
    boxes = [Box(*(int(number) for number in row)) for row in found]
    return sorted(boxes, key=lambda box: (-box.width * box.height, box))
