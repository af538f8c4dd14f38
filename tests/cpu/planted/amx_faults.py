"""Faults of the AMX kernels (csrc/cpu/amx), which are tested on emulated tiles.

Each line: name, right text, wrong text, the tests that detect it, and a part of the name of the test that
runs first.
"""

# One fault in a line.
# ruff: noqa: E501
# fmt: off

from __future__ import annotations

from .fault import AMX, Fault

_OPS = "tests/cpu/test_amx.py::test_linear_ops"
_NONFINITE = "tests/cpu/test_instruction_sets.py::test_nonfinite"
_GROUP = "tests/cpu/test_instruction_sets.py::test_linear_lora_group"
_TILED_ATTENTION = "tests/cpu/test_instruction_sets.py::test_attention"
_TILED_LOSS = "tests/cpu/test_instruction_sets.py::test_linear_cross_entropy"

_FAULTS = {
    "layout.h": (
        ("x: the pairs of a group of 128 are swapped", "low_pairs(v[4 * p], v[4 * p + 2])", "low_pairs(v[4 * p + 2], v[4 * p])", _OPS),
        ("x: the pairs of a last group of 64 are swapped", "low_pairs(v[2 * p], v[2 * p + 1])", "low_pairs(v[2 * p + 1], v[2 * p])", _OPS),
        ("x: elements beyond K are those of the next token", "x.existing(k + 32 * part)", "0xffffffff", _NONFINITE, "5-33-97-bf16"),
        ("the dropout mask of the next element", "bits_at(kept, position + offset)", "bits_at(kept, position + offset + 1)", _OPS, "r40 dropout-one tile of tokens"),
        ("A: the planes of nibbles are swapped", "static_cast<short>(c)", "static_cast<short>(c ^ 1)", _OPS),
        ("A: a last group of 64 is not split", "_mm512_add_epi16(second, shift)", "second", _OPS),
        ("grad_x: even rows twice", "odd[4 * j + c].bits", "even[4 * j + c].bits", _OPS),
    ),
    "decode.h": (
        ("nibbles are swapped", "lookup_words(words, upper_half, tables)", "lookup_words(_mm512_srli_epi16(words, 4), upper_half, tables)", _OPS),
        ("forward: the absmax of the neighbouring block", "two_tables(absmax[0], absmax[1])", "two_tables(absmax[0], absmax[0])", _OPS),
        ("grad_x: the absmax of the first row for both rows", "two_tables(absmax[0], absmax[row_groups])", "two_tables(absmax[0], absmax[0])", _OPS),
        ("nibbles of a last group of 64 are swapped", "_mm512_permutexvar_epi16(words, table)", "_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table)", _OPS),
        ("one absmax for all blocks of a piece", "blocks[((group0 + i) >> shift) - block0]", "blocks[0]", _OPS, "r4-blocks longer than rows"),
        ("forward: the absmax of the next units", "u.absmax += 2 - (u.valid_rows - 1) * u.row_groups;", "u.absmax += 1 - (u.valid_rows - 1) * u.row_groups;", _OPS, "r4-two tiles, last block of one"),
        ("forward: rows beyond N", "u.row < u.valid_rows", "u.row < u.rows", _OPS, "r4-N not a multiple of 32"),
        ("grad_x: the absmax of the next rows", "u.absmax += 2 * u.row_groups;", "u.absmax += u.row_groups;", _OPS),
        ("grad_x: the first row of a pair twice, in any weight", "n0 + 2 * p + i", "n0 + 2 * p", _OPS),
        ("blocks of 32 in the decoder of 64", "w.block_shift >= 6", "w.block_shift >= 5", _OPS, "r4-blocks of 32"),
        ("stored absmax of longer blocks", "w.absmax && w.block_shift == 6", "w.absmax != nullptr", _OPS, "r4-blocks of 4096"),
        ("forward: a row of any weight is another row", "decode_range<RoundForDot>(w, n * w.K + k0 + k, n * w.K + k0 + k + count, row)", "decode_range<RoundForDot>(w, n0 * w.K + k0 + k, n0 * w.K + k0 + k + count, row)", _OPS, "r4-K not a multiple of 64"),
    ),
    "product.h": (
        ("the sums of the last chunk alone", "begin == Sums::kZero", "begin != Sums::kTiles", _OPS),
        ("sums in tiles are not stored", "stays && !last", "stays", _OPS),
        ("sums in tiles start from memory", "stays ? Sums::kTiles : Sums::kMemory", "Sums::kMemory", _OPS),
        ("the last strips of a task are lost", "(s + 1) * shape.strips / by_strips", "(s * shape.strips / by_strips + 1)", _OPS),
        ("the second tile of tokens is multiplied with the first columns", "tile_dot<3, 5, 7>()", "tile_dot<3, 5, 6>()", _OPS, "r4-two tiles, last block of one"),
        ("units that no product interleaves are lost", "decode_remaining(units, prefetch_distance);", ";", _OPS, "r40 dropout-one chunk"),
        ("a chunk is multiplied with another chunk of tokens", "return place.chunk * chunk_steps;", "return int64_t{0};", _OPS),
    ),
    "low_rank.h": (
        ("s: all ranks are the first", "j * K + k", "k", _OPS),
        ("ds: all ranks are the first", "n * lora.r + j", "n * lora.r", _OPS, "r40 dropout-one tile of tokens"),
        ("s: the second tile of tokens is the first", "(i * count + t) * kTileFloats", "(i * count) * kTileFloats", _OPS, "r4-two tiles, last block of one"),
        ("ds: scaling is missing", "mul(load(row), factor)", "load(row)", _OPS),
        ("ds: the second tile of ranks is the first", "(m / 16 * ranks + i) * kTileFloats", "(m / 16 * ranks) * kTileFloats", _OPS, "r40 dropout-one tile of tokens"),
    ),
    "token_products.h": (
        ("grad_A, grad_B: the last piece of tokens alone", "step == 0 ? Sums::kZero : Sums::kMemory", "Sums::kZero", _OPS, "r4-tokens divided among threads"),
        ("grad_A, grad_B: the first token of a pair twice", "m0 + 2 * p + i", "m0 + 2 * p", _OPS),
        ("grad_A, grad_B: the factor is missing", "mul(load(sums + (j / 16 * kStripTiles + t) * kTileFloats + j % 16 * 16), factor)", "load(sums + (j / 16 * kStripTiles + t) * kTileFloats + j % 16 * 16)", _OPS),
        ("grad_A, grad_B: all ranks of a tile are tokens of the first", "j % 16 * kTileRowBytes + m * 2", "m * 2", _OPS),
    ),
    "linear_nf4.cpp": (
        ("s: 1 / (1 - p) is missing", "kept ? keep_scale(*lora) : 1.0f", "1.0f", _OPS, "r40 dropout-one tile of tokens"),
        ("the bias is missing in every second tile", "_mm512_maskz_loadu_ps(static_cast<__mmask16>(valid >> 16), bias + 16)", "zero()", _OPS),
        ("B: scaling is missing", "lora->scaling", "1.0f", _OPS),
        ("B: all rows are the first", "n * lora->r + j", "j", _OPS),
        ("the dropped x is multiplied with W", "if (kept) pack_x(nullptr);", ";", _OPS, "r40 dropout-one tile of tokens"),
        ("the low-rank steps are not the first", "step0 == 0 ? 0 : extra_steps() + step0", "extra_steps() + step0", _OPS),
        ("absmax of a strip is that of the group's first", "scratch + (place.strip - place.group0) * strip_rows() * groups", "scratch", _OPS),
    ),
    "linear_nf4_grad_x.cpp": (
        ("grad_x: columns in the order of nibbles", "_mm512_permutex2var_epi16(first, low, second)", "first", _OPS),
        ("grad_x: all ranks are the first", "j * w.K + k0", "k0", _OPS),
        ("grad_x: the mask of other columns", "uint64_t{0x1111111111111111} << t", "uint64_t{0x1111111111111111}", _OPS, "r40 dropout-one tile of tokens"),
        ("grad_x: the mask of another thread's tokens", "(position + m0 + m) * w.K", "(m0 + m) * w.K", _OPS, "r40 dropout-tokens divided among threads"),
        ("grad_x: 1 / (1 - p) is missing", "keep(mul(load(row), factor), static_cast<uint32_t>(every_fourth))", "keep(load(row), static_cast<uint32_t>(every_fourth))", _OPS, "r40 dropout-one tile of tokens"),
        ("grad_x: no mask", "step0 == 0 && lora && kept", "false", _OPS, "r40 dropout-one tile of tokens"),
        ("grad_x: the mask of the second half of a strip", "bits |= bits_at(kept, first + 32) << 32;", "bits |= bits << 32;", _OPS, "r40 dropout-one tile of tokens"),
        ("absmax: every range is the first", "absmax_of_groups(w, begin, end - begin, out + begin);", "absmax_of_groups(w, begin, end - begin, out);", _OPS),
        ("grad_x: accumulators of the second tile of tokens", "(t / 2 * 4 + j * 2 + t % 2) * kTileFloats", "(t / 2 * 4 + t % 2) * kTileFloats", _OPS, "r4-two tiles, last block of one"),
        ("grad_x: the low-rank steps are not the first", "step0 == 0 ? 0 : extra_steps() + step0", "extra_steps() + step0", _OPS),
        ("grad_B is transposed", "grad_B[(column + n) * r + j] = sums[n];", "grad_B[(column + n) * r + r - 1 - j] = sums[n];", _OPS),
    ),
    "linear_nf4_lora_group.cpp": (
        ("group: s of all members in the first columns", "copy_rows(own.data(), lora.r, M, lora.r, columns, R);", "copy_rows(own.data(), lora.r, M, lora.r, static_cast<Bf16*>(s), R);", _GROUP, "M3-K64-0.0-bf16"),
        ("group: grad_x of the last member alone is lost", "grad_x && i > 0", "grad_x && i > 1", _GROUP, "M3-K64-0.0-bf16"),
        ("group: grad_A of all members is the first", "grad_A += lora.r * K;", ";", _GROUP, "M3-K64-0.0-bf16"),
    ),
    "amx_tiles.h": (
        ("attention: products start from old sums", "!adds", "false", _TILED_ATTENTION, "80-bf16"),
        ("attention: the second tile of rows is missing", "rows > kTileRows", "false", _TILED_ATTENTION, "80-bf16"),
        ("loss: the second tile of rows is multiplied with other columns", "tile_dot<3, 5, 7>()", "tile_dot<3, 5, 6>()", _TILED_LOSS, "270-300-65-4.0-bf16"),
    ),
}

AMX_FAULTS = tuple(
    Fault(f"amx: {name}", f"amx/{file}", right, wrong, test, AMX, *first)
    for file, faults in _FAULTS.items()
    for name, right, wrong, test, *first in faults
)
