"""Shifted chunks, segments and groups in loops; the author saw the formulas only, neither code nor tests."""

import torch


def fixed_shifts(heads, w):
    """Half of the heads 0, the other half w // 2 (eq. 3); first half first."""
    return [0 if 2 * h < heads else w // 2 for h in range(heads)]


def flow_shifts(heads, w, length):
    """Heads in n = T / w groups, group g shifts by g w (eq. 4); fewer heads than groups: the nearest chunks."""
    n = -(-length // w)
    return [h * w if heads <= n else (h * n // heads) * w for h in range(heads)]


def sees_chunk(i, j, w, s, length, causal=True, wrap=False):
    """Query i, key j, chunk w, shift s (eq. 1, 2). wrap (not causal only): keys before 0 are taken from the end."""
    if causal and j > i:
        return False
    first = (i // w) * w - s
    return any(key == j or (wrap and not causal and key % length == j) for key in range(first, first + w))


def sees_dilated(i, j, segment, dilation, offset, causal=True):
    """Eq. 5."""
    if causal and j > i:
        return False
    return i // segment == j // segment and (j - offset) % dilation == 0


def shifted_chunks(length, w, shifts, causal=True, wrap=False):
    """-> bool (H,T,T)."""
    return torch.tensor(
        [[[sees_chunk(i, j, w, s, length, causal, wrap) for j in range(length)] for i in range(length)] for s in shifts]
    )


def shifted_dilated(length, segment, dilation, offsets, causal=True):
    """-> bool (H,T,T); offsets of the paper: h % dilation."""
    return torch.tensor(
        [
            [[sees_dilated(i, j, segment, dilation, o, causal) for j in range(length)] for i in range(length)]
            for o in offsets
        ]
    )


def allowed_chunks(length, heads, kind, w, segment=None, dilation=None, causal=True):
    """kind "fixed" | "flow" | "dilated" | "mixed" -> bool (H,T,T).

    mixed (eq. 6; the split is not given): the first half of the heads fixed SCCA among themselves, the rest dilated,
    o_h = h mod r with h the head's number in the whole layer.
    """
    if kind == "fixed":
        return shifted_chunks(length, w, fixed_shifts(heads, w), causal)
    if kind == "flow":
        return shifted_chunks(length, w, flow_shifts(heads, w, length), causal)
    offsets = [h % dilation for h in range(heads)]
    if kind == "dilated":
        return shifted_dilated(length, segment, dilation, offsets, causal)
    half = (heads + 1) // 2
    return torch.cat(
        [
            shifted_chunks(length, w, fixed_shifts(half, w), causal),
            shifted_dilated(length, segment, dilation, offsets[half:], causal),
        ]
    )


# Doubts: which half is shifted; odd H; H > n groups not dividing; residues counted from 0 of the sequence (as eq. 5 is
# written) or of the segment (equal when r divides g); the mixed split. A row without a key gives output 0.


def sees_group(h, i, j, length, group, heads, shifted=None, sinks=0, wrap="cut"):
    """Whether query i of head h may see key j. wrap "cut": the wrapped group is cut in two; "roll": left so (leaks)."""
    if j < sinks and j <= i:
        return True
    shifted = heads // 2 if shifted is None else shifted
    s = group // 2 if h >= heads - shifted else 0
    if wrap == "cut" or s == 0:
        # groups of the shifted half begin at s, s + w, ...; tokens before s are a group of their own
        return j <= i and (i - s) // group == (j - s) // group
    place_i, place_j = (i - s) % length, (j - s) % length  # rolled by -s; causal inside the rolled group
    return place_i // group == place_j // group and place_j <= place_i


def allowed_groups(length, group, heads, shifted=None, sinks=0, wrap="cut"):
    """-> bool (H,T,T)."""
    return torch.tensor(
        [
            [
                [sees_group(h, i, j, length, group, heads, shifted, sinks, wrap) for j in range(length)]
                for i in range(length)
            ]
            for h in range(heads)
        ]
    )


# Doubts: odd H (here the last H // 2 heads are shifted); a length that the group does not divide (the account refuses).
