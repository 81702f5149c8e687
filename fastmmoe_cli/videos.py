"""Read the videos of a command: animations and directories of frames by Pillow, other files by PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmmoe_cli.console import fail, refusing
from fastmmoe_cli.extras import missing_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastmmoe.families.videos import Video

DECODER = "av"  # PyAV's module, and its name to pip

def check_videos(paths: Sequence[Path]) -> None:
    """Check, before any work, that there are such videos and that this machine can read them."""
    for path in paths:
        if not path.exists():
            fail(f"--video {path}: No such file or directory")
        if path.is_dir():
            _frame_files(path)
        elif not _is_animation(path) and missing_of([DECODER]):
            fail(
                f"--video {path}: to decode it, pip install {DECODER} (PyAV); an animated GIF, WebP or PNG and a "
                "directory of frames need no decoder"
            )


def open_videos(paths: Sequence[Path], processor: Any) -> list[Video]:
    """The videos, of which a processor chooses the frames."""
    return [_open_video(path, processor) for path in paths]


def _open_video(path: Path, processor: Any) -> Video:
    from transformers.video_utils import load_video

    from fastmmoe.families.images import open_image
    from fastmmoe.families.videos import FRAMES_PER_SECOND, Video, frames_to_take

    if not path.is_dir() and not _is_animation(path):
        try:
            frames, metadata = load_video(
                str(path), backend="pyav", sample_indices_fn=lambda metadata, **_: frames_to_take(processor, metadata)
            )
        except Exception as error:  # decoders raise whatever broken bytes lead them to
            fail(f"--video {path}: not a video that PyAV can read ({error})")
        return Video(frames, metadata)
    if path.is_dir():
        with refusing(ValueError, before="--video "):
            shown, rate = [open_image(file) for file in _frame_files(path)], float(FRAMES_PER_SECOND)
    else:
        shown, rate = _animation(path)
    return _sampled(path, shown, rate, processor)


def _sampled(path: Path, shown: list[Image], rate: float, processor: Any) -> Video:
    import numpy as np
    from transformers.video_utils import VideoMetadata

    from fastmmoe.families.videos import Video, frames_to_take

    sizes = {frame.size for frame in shown}
    if len(sizes) > 1:
        fail(f"--video {path}: expected frames of one size, got {' and '.join(f'{w} x {h}' for w, h in sorted(sizes))}")
    width, height = shown[0].size
    metadata = VideoMetadata(
        total_num_frames=len(shown), fps=rate, duration=len(shown) / rate, width=width, height=height
    )
    metadata.frames_indices = frames_to_take(processor, metadata)
    return Video(np.stack([np.asarray(shown[number]) for number in metadata.frames_indices]), metadata)


def _animation(path: Path) -> tuple[list[Image], float]:
    """The frames of an animation, and how many a second there are."""
    from PIL import Image, ImageSequence

    try:
        with Image.open(path) as animation:
            parts = [
                (frame.convert("RGB"), frame.info.get("duration") or 100) for frame in ImageSequence.Iterator(animation)
            ]
    except Exception as error:  # as above
        fail(f"--video {path}: not an animation that Pillow can read ({error})")
    return [frame for frame, _ in parts], 1000 * len(parts) / sum(duration for _, duration in parts)


def _is_animation(path: Path) -> bool:
    """Whether Pillow reads the file; a picture that does not move, or is broken, is refused."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            frames = getattr(image, "n_frames", 1)
    except UnidentifiedImageError:
        return False
    except Exception as error:
        fail(f"--video {path}: {getattr(error, 'strerror', None) or f'cannot be read ({error})'}")
    if frames == 1:
        fail(f"--video {path}: a single picture, expected several frames; --image takes it")
    return True


def _frame_files(directory: Path) -> list[Path]:
    """The pictures in a directory, by name."""
    from PIL import Image

    known = Image.registered_extensions()
    files = sorted(file for file in directory.iterdir() if file.suffix.lower() in known)
    if len(files) < 2:
        fail(
            f"--video {directory}: expected a directory of frames, pictures in the order of their names; "
            f"it has {len(files)}"
        )
    return files
