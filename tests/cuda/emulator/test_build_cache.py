"""The cache of compiled objects: its keys do not depend on what other threads and processes make beside them."""

import tempfile
from pathlib import Path

import pytest

from tests.support.cuda_host.build import _key, store_text
from tests.support.cuda_host.toolchain import CACHE, missing_tools

pytestmark = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))


def test_keys_of_translated_sources_do_not_read_the_cache() -> None:
    """Other builds add and remove folders in the cache at any time; a scan of it fails when one of them goes."""
    source = store_text("int main() {}\n", ".cpp")
    key = _key(source, ())
    with tempfile.TemporaryDirectory(dir=CACHE) as unfinished:
        (Path(unfinished) / "other.h").write_text("#define OTHER\n")
        assert _key(source, ()) == key


def test_keys_follow_the_headers_beside_a_source(tmp_path: Path) -> None:
    source = tmp_path / "source.cpp"
    source.write_text('#include "beside.h"\n')
    keys = []
    for text in ("#define VALUE 1\n", "#define VALUE 2\n"):
        (tmp_path / "beside.h").write_text(text)
        keys.append(_key(source, ()))
    assert keys[0] != keys[1]
