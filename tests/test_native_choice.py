"""Which level of the native kernels is chosen, what is said of it, and what is refused."""

from __future__ import annotations

import pytest
from test_native import needs_library
from torch import Tensor

from qmix.errors import UsageError
from qmix.formats.packed import Packed
from qmix.kernels import native
from qmix.kernels.native import NativeProducts
from qmix.kernels.table import select


class TestChoice:
    @pytest.fixture(autouse=True)
    def no_level_is_forced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("QMIX_NATIVE", raising=False)

    def lines(self, **options: str) -> tuple[list[str], dict[str, str]]:
        said: list[str] = []
        return said, dict(select({"int4", "int8"}, {64}, say=said.append, **options).names)

    @needs_library
    def test_the_best_level_is_taken_and_named(self) -> None:
        best = next(iter(native.levels()))
        said, names = self.lines(activations="auto")
        assert said == [] and names["int4"] == names["int8"] == f"native {best}, int8 activations"
        said, names = self.lines(activations="bf16")
        assert names["int4"] == f"native {best}, bf16 activations" and "torch" in names["int8"]

    @needs_library
    def test_a_level_can_be_forced_or_all_left_out(self, monkeypatch) -> None:
        for level in native.levels():
            monkeypatch.setenv("QMIX_NATIVE", level)
            assert level in self.lines(activations="int8")[1]["int4"]
        monkeypatch.setenv("QMIX_NATIVE", "off")
        assert "torch" in self.lines(activations="auto")[1]["int4"] or "reference" in self.lines()[1]["int4"]
        with pytest.raises(UsageError, match="only the native kernels"):
            self.lines(activations="int8")
        monkeypatch.setenv("QMIX_NATIVE", "avx1024")
        with pytest.raises(UsageError, match="QMIX_NATIVE=avx1024: want off or "):
            self.lines()

    def test_without_the_library_torch_computes_and_it_is_said(self, monkeypatch) -> None:
        monkeypatch.setattr("qmix.kernels.native.loader._found", lambda: (None, "no C compiler was found (cc)"))
        said, names = self.lines(activations="auto")
        assert "no native kernels: no C compiler was found (cc)" in said[0] and "native" not in names["int4"]

    @needs_library
    def test_a_library_of_an_earlier_build_is_used_and_said(self, monkeypatch) -> None:
        found = native.library(), "an earlier build is in use, the last one failed: x.c: error"
        monkeypatch.setattr("qmix.kernels.native.loader._found", lambda: found)
        said, names = self.lines(activations="auto")
        assert said == [f"native kernels: {found[1]}"] and names["int4"].startswith("native")

    @needs_library
    def test_kernels_that_give_wrong_numbers_are_not_used(self, monkeypatch) -> None:
        right = NativeProducts.linear
        monkeypatch.setattr(NativeProducts, "linear", lambda self, x, *m: [1.02 * y for y in right(self, x, *m)])
        said, names = self.lines(activations="auto")
        assert all("failed their self-test" in line for line in said[:len(native.levels())])
        assert "native" not in names["int4"]

    @needs_library
    @pytest.mark.skipif(len(native.levels()) < 2, reason="one level only")
    def test_the_next_best_level_takes_over(self, monkeypatch) -> None:
        right, (best, second, *_) = NativeProducts.linear, native.levels()

        def linear(self: NativeProducts, x: Tensor, *m: Packed) -> list[Tensor]:
            return [y * (1.02 if best in self.name.split(",")[0].split() else 1) for y in right(self, x, *m)]

        monkeypatch.setattr(NativeProducts, "linear", linear)
        said, names = self.lines(activations="auto")
        assert len(said) == 1 and best in said[0] and names["int4"] == f"native {second}, int8 activations"

    def test_what_does_not_apply_is_refused(self) -> None:
        with pytest.raises(UsageError, match="has no matrices in int8"):
            select({"bf16"}, say=print, activations="int8")
        with pytest.raises(UsageError, match="--activations fp8"):
            select({"int4"}, {64}, say=print, activations="fp8")
