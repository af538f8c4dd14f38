"""Faults of the codec, the optimizer step, attention, the loss and the elementwise ops of csrc/cpu.

Each line: name, right text, wrong text, the tests that detect it, instruction set, and a part of the name of the test that
runs first.
"""

# One fault in a line.
# ruff: noqa: E501
# fmt: off

from __future__ import annotations

from .fault import BEST, BF16, Fault

_QUANTIZE = "tests/ops/test_quantize_nf4.py::"
_BYTES = "tests/cpu/test_instruction_sets.py::test_codec_bytes"
_BOUNDARY = "tests/cpu/test_instruction_sets.py::test_every_boundary"
_ADAMW = "tests/ops/test_adamw_step.py::"
_DROPOUT = "tests/ops/test_linear_nf4_lora.py::"
_ATTENTION = "tests/ops/test_attention.py::"
_LOSS = "tests/ops/test_linear_cross_entropy.py::"
_HEADS = "tests/ops/test_linear_cross_entropy_heads.py::"
_SOFTCAP = "tests/cpu/test_instruction_sets.py::test_softcap_of_large_scores"
_NORM = "tests/ops/test_rms_norm.py::"
_ROPE = "tests/ops/test_rope.py::"
_GLU = "tests/ops/test_glu.py::"
_TIES = "tests/cpu/test_instruction_sets.py::test_ties_are_rounded_to_even"

_FAULTS = {
    "quantize_nf4.cpp": (
        ("boundaries of positive numbers", "_mm512_permutex2var_ps(boundary[0], cell, boundary[1])", "_mm512_permutex2var_ps(boundary[0], cell, boundary[0])", _QUANTIZE, BF16, "test_matches_reference[32-1-fp32-cpu]"),
        ("the smallest absmax is divided by", "value < kSmallestAbsmax ? 0.0f : value", "value", _QUANTIZE, BEST, "test_zero_and_tiny_blocks[fp32-cpu]"),
        ("a block of zeros is divided by zero", "absmax == 0.0f || float_bits(absmax) >= 0x7f800000", "float_bits(absmax) >= 0x7f800000", _QUANTIZE, BEST, "test_zero_and_tiny_blocks[fp32-cpu]"),
        ("fp16: even weights twice", "_mm512_srli_epi32(words, 16)", "words", _QUANTIZE, BF16, "test_matches_reference[32-1-fp16-cpu]"),
        ("the nibble that pads an odd tail", "memcpy(packed + (i >> 1), bytes, static_cast<size_t>((n - i + 1) >> 1));", "memcpy(packed + (i >> 1), bytes, static_cast<size_t>((n - i) >> 1));", _QUANTIZE, BEST, "test_matches_reference[32-1-fp32-cpu]"),
        ("absmax of a block with a tail", "static_cast<int>(n - i < kLanes ? n - i : kLanes)", "static_cast<int>(n - i < kLanes ? 1 : kLanes)", _QUANTIZE, BEST, "test_matches_reference[32-31-fp32-cpu]"),
        ("avx2: even weights twice", "_mm256_shuffle_ps(first, second, 0xdd)", "_mm256_shuffle_ps(first, second, 0x88)", _BYTES, "avx2"),
        ("avx2: the second step of the search", "_mm256_setr_ps(kBoundaries[3], kBoundaries[11], 0, 0, 0, 0, 0, 0)", "_mm256_setr_ps(kBoundaries[11], kBoundaries[3], 0, 0, 0, 0, 0, 0)", _BYTES, "avx2"),
        ("portable: a value on a boundary", "v[i] > kCellTable.boundary[c]", "v[i] >= kCellTable.boundary[c]", _BOUNDARY, "portable"),
    ),
    "quantize_absmax.cpp": (
        ("the mean is not subtracted", "absmax[begin + i] - offset", "absmax[begin + i]", _QUANTIZE, BEST, "test_double_quantization_matches_reference[1-cpu]"),
    ),
    "dynamic_map.h": (
        ("a value on a boundary", "x > kBoundaries[guess]", "x >= kBoundaries[guess]", _ADAMW, BEST, "test_backends_equal_reference_bits[cpu-bf16-8-nearest-usual]"),
        ("a code that is one too high", "guess > 0 && !(x > kBoundaries[guess - 1])", "false", _ADAMW, BEST, "test_backends_equal_reference_bits[cpu-fp32-8-nearest-usual]"),
        ("codes are not corrected", "any_above(farthest, kClose)", "false", _ADAMW, BEST, "test_backends_equal_reference_bits[cpu-fp32-8-nearest-usual]"),
        ("numbers below the first code", "_mm512_maskz_cvtps_epi32(counts, within)", "_mm512_cvtps_epi32(within)", _ADAMW, BF16, "test_backends_equal_reference_bits[cpu-fp32-8-nearest-usual]"),
    ),
    "dropout.cpp": (
        ("every call is the first of its range", "static_cast<uint64_t>(b)", "static_cast<uint64_t>(begin)", _DROPOUT, BEST, "test_forward_and_gradients[0.3-M7-N33-K96-r4-b64-fp32-cpu]"),
        ("a draw equal to the threshold is dropped", "_mm512_cmpge_epu16_mask(_mm512_load_si512(words), limit)", "_mm512_cmpgt_epu16_mask(_mm512_load_si512(words), limit)", _DROPOUT, BF16, "test_forward_and_gradients[0.3-M64-N192-K320-r16-b64-fp32-cpu]"),
    ),
    "adamw_step.cpp": (
        ("the gradient is not multiplied", "g[i] * c.grad_multiplier", "g[i]", _ADAMW, BEST, "test_backends_equal_reference_bits[cpu-fp32-32-nearest-usual]"),
        ("lerp from the gradient", "c.beta1_weight >= 0.5f", "false", _ADAMW, BEST, "test_backends_equal_reference_bits[cpu-fp32-32-nearest-small-beta1]"),
        ("draws of the first elements", "(counter + static_cast<uint64_t>(begin)) >> 3", "counter >> 3", _ADAMW, BEST, "test_backends_equal_reference_bits[cpu-bf16-32-stochastic-usual]"),
        ("stochastic rounding truncates", "words[i >> 1] >> (16 * (i & 1)) & 0xffff", "0u", _ADAMW, BEST, "test_backends_equal_reference_bits[cpu-bf16-32-stochastic-usual]"),
        ("the segment's draws are those of its parameter", "static_cast<uint64_t>(segment.counter + i)", "static_cast<uint64_t>(i)", _ADAMW, BEST, "test_backends_equal_reference_bits[cpu-bf16-32-stochastic-usual]"),
        ("moments that are not finite are kept", "restart_nonfinite(m, v, largest_m, largest_v);", ";", _ADAMW, BEST, "test_nonfinite_gradient_affects_only_its_element_of_8bit_block[cpu-nan]"),
        ("bias correction of the root", "__builtin_sqrtf(v[i]) / c.root_correction + c.eps", "__builtin_sqrtf(v[i]) + c.eps", _ADAMW, BEST, "test_backends_equal_reference_bits[cpu-fp32-32-nearest-usual]"),
        ("weight decay", "p[i] * c.decay", "p[i]", _ADAMW, BEST, "test_backends_equal_reference_bits[cpu-fp32-32-nearest-usual]"),
        ("absmax of the first block", "reinterpret_cast<float*>(s.arena + segment.exp_avg_absmax) + i / kBlock", "reinterpret_cast<float*>(s.arena + segment.exp_avg_absmax)", _ADAMW, BEST, "test_backends_equal_reference_bits[cpu-fp32-8-nearest-usual]"),
    ),
    "attention.h": (
        ("the maximum does not rise", "highest_score > shift + kRise2 || shift == -kInfinity", "shift == -kInfinity", _ATTENTION),
        ("sums are not rescaled", "if (factor != 0.0f) rescale(r, factor, buffers.sums);", ";", _ATTENTION),
        ("totals are not rescaled", "rows.totals[r] *= factor;", ";", _ATTENTION),
        ("rowsum(dO O) is missing", "mul(e, add(load(dp + at), minus_delta))", "mul(e, load(dp + at))", _ATTENTION),
        ("the derivative of the softcap", "mul(ds, subtract(set1(1.0f), mul(t, t)))", "ds", _ATTENTION, BEST, "test_softcap_and_scale[fp32-cpu]"),
        ("the last queries of a block of keys", "last == 0 ? 0 : steps_to(last)", "last == 0 ? 0 : steps_to(last) - Tiles::kStepMultiple", _ATTENTION),
        ("log_sums: the maximum is missing", "rows.maxima[r] * kLn2 + std::log(total)", "std::log(total)", _ATTENTION),
        ("deltas are those of the first token", "grad + r * gradients.grad_out.token", "grad", _ATTENTION, BEST, "test_causal_attention_and_its_gradients[one block-fp32-cpu]"),
    ),
    "attention_operands.h": (
        ("keys in front of a window are visible", "lanes_below(range.last) & ~lanes_below(range.first)", "lanes_below(range.last)", _ATTENTION, BEST, "test_window_hides_distant_keys[1-cpu]"),
        ("whole vectors in front of a window are visible", "range.first <= column && column + kLanes <= range.last", "column + kLanes <= range.last", _ATTENTION, BEST, "test_window_hides_distant_keys[1-cpu]"),
        ("the first tile of rows for all", "left + t * Tiles::kRows * kBlock + step0 * kPair", "left + step0 * kPair", _ATTENTION, BEST, "test_causal_attention_and_its_gradients[one block-fp32-cpu]"),
    ),
    "linear_cross_entropy.h": (
        ("totals are not rescaled", "total *= factor;", ";", _LOSS),
        ("the label stays among the probabilities", "score = -kInfinity;", ";", _LOSS),
        ("the derivative of the softcap", "mul(e, softcap_slope(value, over_cap))", "e", _LOSS, BEST, "test_losses_and_gradient_of_hidden[bias, scale and softcap-one token-fp32-cpu]"),
        ("sums are not rescaled", "if (results_.grad_hidden && factor != 0.0f) rescale(i, rows, factor, sums);", ";", _LOSS),
        ("parts are not weighted", "part_weight(part, token, base) * totals_[part * learned_ + token]", "totals_[part * learned_ + token]", _LOSS, BEST, "test_losses_and_gradient_of_hidden[plain-blocks and chunks that are not full-fp32-cpu]"),
        ("the label's gradient lacks the -1", "std::expm1(z - log_sum)", "std::exp(z - log_sum)", _LOSS),
        ("the label's gradient lacks the softcap", "1.0f - capped * capped", "1.0f", _LOSS, BEST, "test_losses_and_gradient_of_hidden[bias, scale and softcap-one token-fp32-cpu]"),
        ("low-rank columns of the head", "v * w.rank + k + own - columns", "v * w.rank", _HEADS),
        ("the bias of the first chunk", "convert_row(p_.bias, v, left < kLanes ? left : kLanes, bias);", "convert_row(p_.bias, v % kChunk, left < kLanes ? left : kLanes, bias);", _LOSS, BEST, "test_losses_and_gradient_of_hidden[bias, scale and softcap-blocks and chunks that are not full-fp32-cpu]"),
    ),
    "exp.h": (
        ("tanh does not saturate", "maximum(mul(x, set1(-1.0f)), set1(-kSaturated))", "mul(x, set1(-1.0f))", _SOFTCAP, "avx2"),
        ("2^f: the last coefficient", "set1(6.931472028550421e-1f)", "set1(6.94e-1f)", _LOSS),
    ),
    "rms_norm.cpp": (
        ("the residual is not added", "add(v, load_n(residual + c, n))", "v", _NORM),
        ("grad_s is not added", "if (grad_s) out = add(out, load_n(grad_s + c, n));", ";", _NORM),
        ("grad_weight of the first part alone", "grad_weight[c] += partial[part * C + c];", ";", _NORM),
        ("the offset of the weight", "to_float(weight[c]) + p.offset", "to_float(weight[c])", _NORM, BEST, "test_with_a_residual[(1, 1)-gemma-fp32-cpu]"),
        ("the projection along the row", "fma(load_n(s + c, n), along, g)", "g", _NORM),
    ),
    "rope.cpp": (
        ("the inverse turns forward", "inverse ? sin_b : mul(sin_a, set1(-1.0f))", "mul(sin_a, set1(-1.0f))", _ROPE),
        ("angles of the first sequence", "batch * p.table_stride + t * p.D", "t * p.D", _ROPE, BEST, "test_forward_and_gradients[heads-2-fp32-cpu]"),
        ("the second half takes the first's cosine", "fma(b, cos_b, mul(a, to_b))", "fma(b, cos_a, mul(a, to_b))", _ROPE),
    ),
    "glu.cpp": (
        ("the derivative of the cubic", "set1(3.0f * kCubic)", "set1(kCubic)", _GLU, BEST, "test_forward_and_gradients[(7, 3)-gelu_tanh-fp32-cpu]"),
        ("very negative gates", "u > set1(-kLargestExponent) ? quotient : zero()", "quotient", _GLU, BEST, "test_large_gates[silu-cpu]"),
        ("the slope of the sigmoid", "mul(activated, s.complement)", "activated", _GLU),
    ),
    "simd_avx512.h": (
        ("bf16: ties are rounded up", "_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff))", "_mm512_add_epi32(_mm512_sub_epi32(bits, odd), _mm512_set1_epi32(0x8000))", _TIES, BF16),
        ("a magnitude that is NaN is lost", "_mm512_max_epu32(_mm512_castps_si512(a), magnitude)", "_mm512_castps_si512(_mm512_max_ps(_mm512_castsi512_ps(magnitude), a))", _QUANTIZE, BF16, "test_nonfinite[0-nan-cpu]"),
    ),
}

OTHER_FAULTS = tuple(
    Fault(f"{file.partition('.')[0]}: {name}", file, right, wrong, test, *rest)
    for file, faults in _FAULTS.items()
    for name, right, wrong, test, *rest in faults
)
