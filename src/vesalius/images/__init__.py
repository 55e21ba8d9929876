"""IMAGES: networks that see: what their channels respond to, what they do, and descriptions that can be tested."""

from __future__ import annotations

from vesalius.images.ablation import ChannelEffects, ablate_channels
from vesalius.images.asked import ask_kind
from vesalius.images.describing import Curves, Kinds, Tuning, tuning_of
from vesalius.images.networks import EFFICIENTNET, Seeing, open_network
from vesalius.images.pictures import LITE0, Pictures, Scaling, picture, read_picture, read_pictures
from vesalius.images.responses import Exciting, Responses, Seen, box_of, exciting, responses, rows_of
from vesalius.images.stimuli import ORIENTATIONS, RADII, curves, stimuli
from vesalius.images.synthesis import Foretold, Made, foretells, synthesise_images

__all__ = [
    "EFFICIENTNET",
    "LITE0",
    "ORIENTATIONS",
    "RADII",
    "ChannelEffects",
    "Curves",
    "Exciting",
    "Foretold",
    "Kinds",
    "Made",
    "Pictures",
    "Responses",
    "Scaling",
    "Seeing",
    "Seen",
    "Tuning",
    "ablate_channels",
    "ask_kind",
    "box_of",
    "curves",
    "exciting",
    "foretells",
    "open_network",
    "picture",
    "read_picture",
    "read_pictures",
    "responses",
    "rows_of",
    "stimuli",
    "synthesise_images",
    "tuning_of",
]
