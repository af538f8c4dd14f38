"""Faults of the linear ops of csrc/cpu, outside of its AMX kernels.

Each line: name, right text, wrong text, the tests that detect it, instruction set, and a part of the name of the test that
runs first.
"""

# One fault in a line.
# ruff: noqa: E501
# fmt: off

from __future__ import annotations

from .fault import BEST, BF16, Fault

_LINEAR = "tests/cpu/test_instruction_sets.py::test_linear["
_FORWARD = "tests/ops/test_linear_nf4.py::"
_CODEC = "tests/ops/test_dequantize_nf4.py::test_matches_reference"
_LORA = "tests/cpu/test_instruction_sets.py::test_linear_lora["
_GROUP = "tests/cpu/test_instruction_sets.py::test_linear_lora_group"

_FAULTS = {
    "dots.h": (
        ("dots: even elements of x twice, in bf16", "_mm512_add_epi16(even, _mm512_set1_epi16(1))", "even", _LINEAR, BF16, "M1-N64-K64-r4-b64-bf16"),
        ("dots: even elements of x twice", "to_float(x[2 * i + 1])", "to_float(x[2 * i])", _LINEAR),
        ("dots, few tokens: one absmax for all blocks", "row_absmax[i][b]", "row_absmax[i][block0]", _LINEAR, BEST, "M8-N64-K128-r4-b64-fp32"),
        ("dots: one absmax for all blocks of a piece", "Arithmetic<T>::Rounding::code(absmax[b])", "Arithmetic<T>::Rounding::code(absmax[block0])", _LINEAR, BEST, "M10-N41-K2112-r4-b64-fp32"),
        ("dots: the bias of the first rows", "bias && i < valid ? bias[n + i] : 0.0f", "bias && i < valid ? bias[i] : 0.0f", _FORWARD, BEST, "test_forward[torch.float32-M1-N64-K64-r4-b64-absmax32-fp32-cpu]"),
        ("dots: every piece of K is multiplied with the first of x", "tokens.tile(t) + k * size", "tokens.tile(t)", _LINEAR, BEST, "M10-N41-K2112-r4-b64-fp32"),
        ("dots: all tokens are added to the first", "sums + tokens.tiling.begin(t) * kGroup", "sums", _LINEAR, BEST, "M13-N256-K128-r20-b128-fp32"),
        ("dots, few tokens: every piece of K is multiplied with the first of x", "x += block0 * 2 * block_bytes * kM;", ";", _LINEAR, BEST, "M2-N130-K4160-r3-b64-fp32"),
        ("dots: rows beyond N are added", "row + i < valid ? row + i : valid - 1", "row + i < valid ? row : valid - 1", _LINEAR),
    ),
    "decode.h": (
        ("a piece of absmax crosses a group", "(group + 1) * kNestedBlocksize - (block + i)", "n", _LINEAR),
        ("absmax: the offset is missing", "out[i] += offset;", ";", _CODEC, BEST, "test_matches_reference[shape2-64-True-fp32-cpu]"),
        ("weights that start inside a byte", "begin & 1", "false", _LINEAR, BEST, "M5-N17-K31-r1-b32-fp32"),
        ("the first weight of a byte for the second", "*dst++ = values[1];", "*dst++ = values[0];", _LINEAR, BEST, "M5-N17-K31-r1-b32-fp32"),
        ("blocks do not end", "block_end < end ? block_end : end", "end", _CODEC, BEST, "test_matches_reference[shape2-64-False-fp32-cpu]"),
    ),
    "gemm.h": (
        ("panels: the sums of the last chain alone", "adds ? add(load(sum), acc[i][j]) : acc[i][j]", "acc[i][j]", _LINEAR),
        ("panels: rows are every third", "rows[i / 3] + i % 3 * stride", "rows[i / 3]", _LINEAR, BEST, "M7-N33-K96-r4-b64-fp32"),
        ("panels: tiles of unequal rows", "tile * fewest + std::min(tile, longer)", "tile * fewest", _LINEAR, BEST, "M19-N130-K257-r8-b128-fp32"),
        ("low rank: the product is lost", "steps == 0 && end.tail_steps > 0", "false", _LORA, BF16, "M7-N33-K96-r4-b64-bf16"),
        ("low rank: added to every weight of a group", "to == step0 + count ? end : StripEnd<Mac>()", "end", _GROUP, BF16, "M3-K64-0.0-bf16"),
        ("low rank: all tiles take its first rows", "tail_a + row * tail_stride", "tail_a", _LORA, BF16, "M19-N130-K257-r8-b128-bf16"),
        ("rounded tiles: all are the first", "out + row * out_stride", "out", _LINEAR, BF16, "M64-N192-K320-r16-b64-bf16"),
        ("rounded tiles: the sums of earlier steps are lost", "adds ? add(load(sum), acc[i][0]) : acc[i][0]", "acc[i][0]", _GROUP, BF16, "M67-K320-0.0-bf16"),
    ),
    "pack.h": (
        ("factors: scaling is missing", "mul(load(values + j), factor)", "load(values + j)", _LORA),
        ("dropout: the mask of a row's first elements", "static_cast<__mmask32>(bits_at(bits, position + i))", "static_cast<__mmask32>(bits_at(bits, position))", _LORA, BF16, "M1-N64-K64-r4-b64-bf16"),
        ("panels: rows of the first strip", "read(column0 + column, begin, n, rows[i]);", "read(column, begin, n, rows[i]);", _LINEAR, BEST, "M7-N33-K96-r4-b64-fp32"),
        ("pairs of tokens: the second is zero", "next ? next[j] : Elem{}", "Elem{}", _LORA, BF16, "M7-N33-K96-r4-b64-bf16"),
        ("pairs of tokens: both are the first", "next + j", "row + j", _LORA, BF16, "M64-N192-K320-r16-b64-bf16"),
        ("panels: columns of the first strip", "read(l, column0, columns, buffers[p])", "read(l, 0, columns, buffers[p])", _LINEAR),
    ),
    "lora.h": (
        ("1 / (1 - p) is missing", "65536.0f / static_cast<float>(65536 - lora.threshold)", "1.0f", _LORA),
        ("all strips share one factor", "column0 / kColumns % kMaxGroup * size", "0 * size", _LORA, BEST, "M19-N130-K257-r8-b128-fp32"),
        ("narrow products: the factor is missing", "mul(load(c + i), factor)", "load(c + i)", _LORA),
        ("low rank: the finished sums are lost", "add(load(c + i), load(product + i))", "load(product + i)", _LORA),
        ("group: a linear's first row is its second", "position - begin(i)", "position - begin(i) + (i > 0)", _GROUP),
    ),
    "linear_nf4_lora.cpp": (
        ("group: all linears take the first s", "terms[i].lhs.data += padded.begin(i);", ";", _GROUP, BEST, "M1-K70-0.0-fp32"),
        ("A: all ranks are the first", "row * K + k", "k", _LORA),
        ("dots: all rows of B are the first", "(n + (i < valid ? i : valid - 1)) * lora.r + j0", "n * lora.r + j0", _LORA),
        ("group: one place for all converted biases", "values[i] = space + copies.begin(i);", "values[i] = space;", _GROUP, BEST, "M1-K70-0.0-bf16"),
        ("dropout does not act on s", "R > 0 ? dropout_bitmap(first, M * K) : nullptr", "nullptr", _LORA),
    ),
    "linear_nf4_lora_backward.cpp": (
        ("dropout does not act on the low-rank part of grad_x", "if (bits) return StripEnd<Mac>();", "", _LORA, BF16, "M1-N64-K64-r4-b64-bf16"),
        ("grad_x: the mask of the first tokens", "(tiling.begin(tile) + i) * K + column0", "i * K + column0", _LORA, BEST, "M19-N130-K257-r8-b128-fp32"),
        ("grad_B: all tiles are the first", "(column0 + n) * r + a.tiling.begin(tile)", "(column0 + n) * r", _LORA, BEST, "M64-N192-K320-r16-b64-fp32"),
        ("grad_A: the mask of the first token", "masked_row(row, count, tokens.bits, m * tokens.width + begin, dst);", "masked_row(row, count, tokens.bits, begin, dst);", _LORA, BEST, "M19-N130-K257-r8-b128-fp32"),
        ("grad_B: the factor is missing", "multiply(c, a.tiling.size(tile) * kColumns, scale);", ";", _LORA),
        ("group: rows of another linear", "weight_row<T>(weight, n, k, count, dst);", "weight_row<T>(group.members[0].weight, n % group.members[0].weight.N, k, count, dst);", _GROUP),
    ),
    "token_product.h": (
        ("tokens in pairs: the second is the first", "_mm512_maskz_loadu_epi16(inside, row + width)", "first", _LORA, BF16, "M64-N192-K320-r16-b64-bf16"),
        ("tokens in pairs: all tiles take the first factors", "a.data + a.tiling.begin(tile) * a.stride", "a.data", _LORA, BF16, "M64-N192-K320-r16-b64-bf16"),
        ("tokens in pairs: one strip for all", "rows + column", "rows", _LORA, BF16, "M64-N192-K320-r16-b64-bf16"),
    ),
    "block_absmax.h": (
        ("absmax: the scale of the first group", "block / kNestedBlocksize", "0", _LINEAR, BEST, "M64-N192-K320-r16-b64-fp32"),
    ),
}

LINEAR_FAULTS = tuple(
    Fault(name, file, right, wrong, test, *rest)
    for file, faults in _FAULTS.items()
    for name, right, wrong, test, *rest in faults
)
