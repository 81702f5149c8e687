"""How an image's tiles become a sequence of tokens: rows of features, a newline behind each, views separated."""

import torch


def tokens_per_side(image_size: int, patch_size: int, downsample_ratio: int) -> int:
    """Features in a row of one tile, s; a last window that is not full counts."""
    return -(-(image_size // patch_size) // downsample_ratio)


def num_image_tokens(tiles_wide: int, tiles_high: int, side: int) -> int:
    """Tokens of an image of `tiles_wide` x `tiles_high` local tiles and a global view, `side` features a row each."""
    return side * (side + 1) + 1 + tiles_high * side * (tiles_wide * side + 1)


def image_token_index(
    tiles_wide: int, tiles_high: int, side: int, first_tile: int, num_tiles: int, global_first: bool = True
) -> torch.Tensor:
    """Where an image's tokens lie in the table of all features, flattened, with the newline and the separator behind.

    Args:
        tiles_wide, tiles_high: local tiles; the image's tiles are its global view, then the local ones row by row.
        side: features in a row of a tile, s.
        first_tile: number of the image's global view among the `num_tiles` tiles that the table is made of.
        global_first: whether the global view comes in front of the local tiles.

    Returns:
        int64 [num_image_tokens(...)], values in 0 .. num_tiles * s * s + 1; the last two are newline and separator.
    """
    newline = num_tiles * side * side
    tiles = torch.arange(first_tile, first_tile + 1 + tiles_wide * tiles_high) * side * side
    features = tiles.view(-1, 1, 1) + torch.arange(side * side).view(side, side)  # [1 + tiles, s, s]
    view = features[0]
    # [high, wide, s, s] -> [high, s, wide, s]: one grid, tiles side by side
    local = features[1:].view(tiles_high, tiles_wide, side, side).transpose(1, 2)
    local = local.reshape(tiles_high * side, tiles_wide * side)
    parts = [_with_newlines(view, newline), torch.tensor([newline + 1]), _with_newlines(local, newline)]
    return torch.cat(parts if global_first else parts[::-1])


def _with_newlines(rows: torch.Tensor, newline: int) -> torch.Tensor:
    return torch.cat((rows, rows.new_full((rows.shape[0], 1), newline)), 1).flatten()
