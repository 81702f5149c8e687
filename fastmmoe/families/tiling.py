"""How a processor cuts a picture into tiles of vision tokens."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tiling:
    """One image: `rows` x `columns` tiles of the resized image, row by row, then, if there is more
    than one, the whole image once more as a thumbnail. A tile is `side` x `side` vision tokens, row by row.
    """

    columns: int
    rows: int
    side: int

    @property
    def has_thumbnail(self) -> bool:
        return self.columns * self.rows > 1

    @property
    def n_tokens(self) -> int:
        return (self.columns * self.rows + self.has_thumbnail) * self.side**2

    def grids(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Lay one value per vision token out as the image shows them.

        Args:
            values: `[n_tokens]`, in sequence order.

        Returns:
            `[rows * side, columns * side]` over the tiles, and `[side, side]` over the thumbnail, None without one.
        """
        tiles = values.reshape(-1, self.side, self.side)
        n_tiles = self.columns * self.rows
        image = tiles[:n_tiles].reshape(self.rows, self.columns, self.side, self.side).swapaxes(1, 2)
        image = image.reshape(self.rows * self.side, self.columns * self.side)
        return image, tiles[n_tiles] if self.has_thumbnail else None
