"""Loads a built library and answers requests on stdin. Uses only the standard library, to start fast in a sanitizer."""

import ctypes
import os
import pickle
import struct
import sys

_FORMATS = {"f32": "<f", "f64": "<d", "pred": "<?"}
_ERROR_BYTES = {-1: "before its start", 1: "past its end"}


def main() -> None:
    library = ctypes.CDLL(sys.argv[1])
    library.cuda_host_error.restype = ctypes.c_char_p
    library.cuda_host_log_line.restype = ctypes.c_char_p
    library.cuda_host_allocate.restype = ctypes.c_void_p
    library.cuda_host_allocate.argtypes = [ctypes.c_size_t]
    library.cuda_host_release.argtypes = [ctypes.c_void_p]
    library.cuda_host_schedule.argtypes = [ctypes.c_uint64, ctypes.c_int]
    # Output of kernels and sanitizers must not be mixed with the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests = sys.stdin.buffer
    while True:
        header = requests.read(8)
        if len(header) < 8:
            return
        message = pickle.loads(requests.read(struct.unpack("<Q", header)[0]))
        answer = pickle.dumps(ACTIONS[message.pop("action")](library, **message))
        answers.write(struct.pack("<Q", len(answer)) + answer)
        answers.flush()


def call(library, name, arguments, memory, seed, order):
    """Copy the memory in, call, and copy it out; report the emulator's error or an overwritten guard."""
    addresses = []
    for content in memory:
        address = library.cuda_host_allocate(len(content))
        ctypes.memmove(address, content, len(content))
        addresses.append(address)
    library.cuda_host_clear_error()
    library.cuda_host_schedule(seed, order)
    kept = []
    if name == "cuda_host_launch_ptx":
        result = launch_ptx(library, arguments, addresses, kept)
    else:
        result = getattr(library, name)(*[to_ctypes(library, a, addresses, kept) for a in arguments])
    error = library.cuda_host_error().decode()
    contents = [ctypes.string_at(address, len(old)) for address, old in zip(addresses, memory, strict=True)]
    for index, address in enumerate(addresses):
        verdict = library.cuda_host_release(address)
        if verdict:
            error = error or f"{name}: memory argument {index} was written {_ERROR_BYTES[verdict]}"
    for address in kept:
        library.cuda_host_release(address)
    return {"result": result, "error": error, "memory": contents}


def to_ctypes(library, argument, addresses, kept):
    """Convert arguments; integers are passed as 64 bits, of which a narrower parameter reads the low part."""
    kind, value = argument
    if kind == "memory":
        return ctypes.c_void_p(addresses[value])
    if kind == "struct":
        memory = packed_struct(library, value, addresses, kept)
        return ctypes.create_string_buffer(memory, len(memory))
    if kind == "table":
        return ctypes.c_void_p(table(library, value, addresses, kept))
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, bytes):
        return ctypes.create_string_buffer(value, len(value))
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value)


def packed_struct(library, value, addresses, kept):
    """Return the bytes of a struct whose pointers are addresses of this call's memory."""
    form, items = value
    words = []
    for kind, item in items:
        if kind == "memory":
            words.append(addresses[item])
        elif kind == "shifted":
            index, nbytes = item
            words.append(addresses[index] + nbytes)
        elif kind == "table":
            words.append(table(library, item, addresses, kept))
        else:
            words.append(0 if item is None else item)
    return struct.pack(f"@{form}", *words)


def table(library, items, addresses, kept):
    """Return a device array of addresses."""
    words = struct.pack(f"<{len(items)}Q", *[addresses[v] if k == "memory" else (v or 0) for k, v in items])
    address = library.cuda_host_allocate(len(words))
    ctypes.memmove(address, words, len(words))
    kept.append(address)
    return address


def launch_ptx(library, arguments, addresses, kept):
    """Pack a kernel's parameters as its PTX declares them, and launch it by name."""
    (_, (_, kernel, grid, block, shared, layout)), *values = arguments
    packed = bytearray(max([offset + size for offset, size, _ in layout], default=0) + 8)
    for (offset, size, type_name), (kind, value) in zip(layout, values, strict=True):
        if kind == "memory":
            word = struct.pack("<Q", addresses[value])
        elif kind == "table":
            word = struct.pack("<Q", table(library, value, addresses, kept))
        elif isinstance(value, bytes):
            word = value
        elif value is None:
            word = bytes(size)
        elif type_name in _FORMATS:
            word = struct.pack(_FORMATS[type_name], value)
        else:
            word = (int(value) & ((1 << (8 * size)) - 1)).to_bytes(size, "little")
        packed[offset : offset + size] = word
    sizes = ctypes.c_uint * 3
    buffer = library.cuda_host_allocate(len(packed))  # aligned, as the driver's parameter block is
    ctypes.memmove(buffer, bytes(packed), len(packed))
    kept.append(buffer)
    launch = library.cuda_host_launch_ptx
    return launch(kernel.encode(), sizes(*grid), sizes(*block), ctypes.c_uint(shared), ctypes.c_void_p(buffer))


def read_log(library, clear):
    """Return the recorded runtime calls, one per line."""
    lines = [library.cuda_host_log_line(i).decode() for i in range(library.cuda_host_log_size())]
    if clear:
        library.cuda_host_clear_log()
    return lines


def read_banks(library):
    """Return [line, instructions, wavefronts, wavefronts needed] of each line that accessed shared memory."""
    values, lines = (ctypes.c_long * 4)(), []
    for i in range(library.cuda_host_bank_lines()):
        library.cuda_host_bank_line(i, values)
        lines.append(list(values))
    return lines


ACTIONS = {
    "call": call,
    "log": read_log,
    "fail": lambda library, call, error, after: library.cuda_host_fail(call.encode(), error, after),
    "attribute": lambda library, attribute, value: library.cuda_host_set_attribute(attribute, value),
    "count_banks": lambda library, enabled: library.cuda_host_count_banks(enabled),
    "banks": read_banks,
    "live": lambda library: library.cuda_host_live_allocations(),
}

if __name__ == "__main__":
    main()
