"""Images of 28 by 28 pixels that are not upright digits, to test a classifier of digits."""

import pathlib

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.font_manager import FontProperties
from matplotlib.patches import PathPatch
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D
from scipy import ndimage
from sklearn.datasets import load_sample_images
from sklearn.feature_extraction.image import extract_patches_2d

LETTERS = "ABCDEFGHJKLMNPQRTUVWXY"  # letters that do not look like digits: not I, O, S, Z


def letters():
    """Capital letters in the fonts of matplotlib, centered in a box of 20 pixels like MNIST's digits."""
    folder = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    kinds = ("DejaVuSans*", "DejaVuSerif*", "STIXGeneral*", "cmb10*", "cmr10*", "cmss10*", "cmtt10*")
    fonts = sorted(
        path for kind in kinds for path in folder.glob(f"{kind}.ttf") if "Display" not in path.name
    )
    figure = plt.Figure(figsize=(len(LETTERS), len(fonts)), dpi=28)
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, len(LETTERS)), ylim=(0, len(fonts)))
    axis.set_axis_off()
    for row, font in enumerate(fonts):
        for column, letter in enumerate(LETTERS):
            path = TextPath((0, 0), letter, size=1, prop=FontProperties(fname=str(font)))
            box = path.get_extents()
            place = Affine2D().translate(-(box.x0 + box.x1) / 2, -(box.y0 + box.y1) / 2)
            place = place.scale(20 / 28 / max(box.width, box.height)).translate(column + 0.5, row + 0.5)
            axis.add_patch(PathPatch(path.transformed(place), color="black", lw=0))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    ink = 1 - np.asarray(canvas.buffer_rgba())[..., 0].astype(np.float32) / 255
    return ink.reshape(len(fonts), 28, len(LETTERS), 28).swapaxes(1, 2).reshape(-1, 28, 28)


def photographs(n):
    """Gray crops of 28 by 28 pixels from the two photographs of scikit-learn."""
    pictures = [picture.mean(-1) / 255 for picture in load_sample_images().images]
    cuttings = [extract_patches_2d(x, (28, 28), max_patches=n // 2, random_state=0) for x in pictures]
    return np.concatenate(cuttings).astype(np.float32)


def rotated(images, angle):
    return ndimage.rotate(images, angle, axes=(1, 2), reshape=False, order=1).clip(0, 1)
