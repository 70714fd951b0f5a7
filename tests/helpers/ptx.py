"""Translates PTX, what nvcc makes of a kernel, to C++ that runs on the CPU.

Of PTX only what the kernels here use; anything else is an error that shows the line. Registers
become arrays, branches `goto`, global memory the host's. Each instruction rounds once, as PTX says
of the `.rn` ones: the others are an error.
"""

from __future__ import annotations

import re

TYPES = {
    **{f"{kind}{bits}": f"uint{bits}_t" for kind in "ub" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
    "f32": "float",
    "f64": "double",
    "pred": "bool",
}
SPECIAL = {"%tid.x": "thread", "%ctaid.x": "block"}
PRELUDE = """
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// Bits where the sizes are the same, else a conversion of integers.
template <class To, class From> To as(From from) {
  if constexpr (sizeof(To) == sizeof(From)) {
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
  } else {
    return static_cast<To>(from);
  }
}
template <class T> T load(uint64_t address) {
  T value;
  std::memcpy(&value, reinterpret_cast<const void*>(address), sizeof(value));
  return value;
}
template <class T> void store(uint64_t address, T value) {
  std::memcpy(reinterpret_cast<void*>(address), &value, sizeof(value));
}
void check_alignment(uint64_t address, unsigned bytes) {
  if (address % bytes != 0) {
    std::fprintf(stderr, "PTX: an access of %u bytes is misaligned\\n", bytes);
    std::abort();
  }
}
template <class T> T shl(T a, uint32_t by) { return by >= 8 * sizeof(T) ? T(0) : T(a << by); }
template <class T> T shr(T a, uint32_t by) {
  return by < 8 * sizeof(T) ? T(a >> by) : T(a < 0 ? -1 : 0);
}
uint64_t bfi(uint64_t a, uint64_t b, uint32_t from, uint32_t count) {
  const uint64_t mask = shl(shl<uint64_t>(1, count) - 1, from);
  return (b & ~mask) | (shl(a, from) & mask);
}
float of_f16(uint16_t bits) { return static_cast<float>(as<_Float16>(bits)); }
uint16_t to_f16(float value) { return as<uint16_t>(static_cast<_Float16>(value)); }
uint16_t to_bf16(float value) {
  const auto bits = as<uint32_t>(value);
  return value != value ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
"""
ALL_THREADS = """
extern "C" void run_NUMBER(char* argument, uint32_t blocks, uint32_t threads) {
  for (uint32_t i = 0; i < blocks * threads; ++i) {
    thread_NUMBER(argument, i / threads, i % threads);
  }
}
"""
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
# By the words before the type: what is made of the operands, each in the instruction's own type.
# Integers wrap, so these are computed without sign.
WRAPPING = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul.lo": "{0} * {1}",
    "mad.lo": "{0} * {1} + {2}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "xor": "{0} ^ {1}",
}
FLOATING = {
    "mul.rn": "{0} * {1}",
    "div.rn": "{0} / {1}",
    "rcp.rn": "1 / {0}",
    "fma.rn": "std::fma({0}, {1}, {2})",
    "neg": "-{0}",
    "setp.neu": "!({0} == {1})",
    "setp.nan": "std::isnan({0}) || std::isnan({1})",
}
OTHERS = {"min": "std::min({0}, {1})", "mov": "{0}"}
NARROW = {"f32.f16": "of_f16", "rn.f16.f32": "to_f16", "rn.bf16.f32": "to_bf16"}
CONVERSIONS = re.compile(r"[us]\d+\.[us]\d+|f64\.f32|rn\.f32\.f64")


class _Kernel:
    def __init__(self) -> None:
        self.parameter = ""

    def operand(self, text: str, kind: str | None = None) -> str:
        """An operand as C++; where `kind` is given, in that type."""
        if text in SPECIAL:
            value = SPECIAL[text]
        elif text == self.parameter:
            value = "reinterpret_cast<uint64_t>(argument)"
        elif match := re.fullmatch(r"%([a-z]+)(\d+)", text):
            value = f"{match[1]}[{match[2]}]"
        elif match := re.fullmatch(r"0([fd])([0-9A-F]+)", text):
            wide = {"f": "uint32_t", "d": "uint64_t"}[match[1]]
            value = f"{wide}(0x{match[2]})"
        elif re.fullmatch(r"-?\d+", text):
            value = f"int64_t({text})" if text != str(-(2**63)) else "INT64_MIN"
        else:
            raise ValueError(f"no operand {text}")
        return f"as<{TYPES[kind]}>({value})" if kind else value

    def put(self, to: str, value: str) -> str:
        to = self.operand(to)
        return f"{to} = as<std::decay_t<decltype({to})>>({value});"

    def address(self, text: str) -> str:
        match = re.fullmatch(r"\[([^+]+?)(?:\+(-?\d+))?\]", text)
        if not match:
            raise ValueError(f"no address {text}")
        return f"{self.operand(match[1])} + {match[2] or 0}"

    def memory(self, words: list[str], operands: list[str]) -> list[str]:
        """Loads and stores, of vectors too."""
        kind = TYPES[words[-1]]
        loads = words[0] == "ld"
        registers, place = operands if loads else operands[::-1]
        names = registers.strip("{}").split(",")
        size = int(words[-1][1:]) // 8
        at = self.address(place)
        lines = [f"check_alignment({at}, {size * len(names)});"]
        for i, name in enumerate(name.strip() for name in names):
            if loads:
                lines.append(self.put(name, f"load<{kind}>({at} + {i * size})"))
            else:
                value = self.operand(name, words[-1])
                lines.append(f"store<{kind}>({at} + {i * size}, {value});")
        return lines

    def instruction(self, line: str) -> list[str]:
        """One instruction, without its predicate."""
        name, _, rest = line.partition(" ")
        operands = [part.strip() for part in re.split(r",\s*(?![^{]*\})", rest.strip())]
        words = name.split(".")
        kind, stem = words[-1], ".".join(words[:-1])
        if words[0] == "bra":
            return [f"goto {operands[0].replace('$', '_')};"]
        if name == "ret":
            return ["return;"]
        if words[0] in ("ld", "st") and words[1] in ("param", "global"):
            return self.memory(words, operands)
        if name == "cvta.to.global.u64":
            return [self.put(operands[0], self.operand(operands[1], kind))]
        if words[0] == "mov" and "{" in rest:  # the lower half comes first
            width = int(kind[1:]) // 2
            low, high = re.search(r"\{(.+)\}", rest)[1].replace(" ", "").split(",")  # type: ignore[index]
            if "{" in operands[0]:
                whole, half = self.operand(operands[1], kind), f"uint{width}_t"
                return [
                    self.put(low, f"{half}({whole})"),
                    self.put(high, f"{half}(shr({whole}, {width}))"),
                ]
            low, high = (self.operand(text, f"u{width}") for text in (low, high))
            packed = f"shl<{TYPES[kind]}>({high}, {width}) | {low}"
            return [self.put(operands[0], f"{TYPES[kind]}({packed})")]
        if words[0] == "cvt":
            stem = ".".join(words[1:])
            if stem in NARROW:
                return [self.put(operands[0], f"{NARROW[stem]}({self.operand(operands[1])})")]
            if CONVERSIONS.fullmatch(stem):
                to, value = TYPES[words[-2]], self.operand(operands[1], kind)
                return [self.put(operands[0], f"static_cast<{to}>({value})")]
        if stem == "selp":
            first, second = (self.operand(text, kind) for text in operands[1:3])
            return [self.put(operands[0], f"{self.operand(operands[3])} ? {first} : {second}")]
        if stem in ("shl", "shr"):
            by = self.operand(operands[2], "u32")
            return [self.put(operands[0], f"{stem}({self.operand(operands[1], kind)}, {by})")]
        if stem == "bfi":
            values = ", ".join(self.operand(text) for text in operands[1:])
            return [self.put(operands[0], f"bfi({values})")]
        if stem == "mul.wide":
            wide = TYPES[f"{kind[0]}{2 * int(kind[1:])}"]
            a, b = (self.operand(text, kind) for text in operands[1:])
            return [self.put(operands[0], f"{wide}({a}) * {b}")]
        if stem == "not":
            negated = "!" if kind == "pred" else "~"
            return [self.put(operands[0], f"{TYPES[kind]}({negated}{self.operand(operands[1])})")]
        is_float = kind in ("f32", "f64")
        made = OTHERS.get(stem)
        if made is None and is_float:
            made = FLOATING.get(stem)
        elif made is None and words[0] == "setp" and words[1] in COMPARISONS:
            made = f"{{0}} {COMPARISONS[words[1]]} {{1}}"
        elif made is None and stem in WRAPPING:
            made = WRAPPING[stem]
            kind = kind if kind == "pred" else f"u{kind[1:]}"
        if made is None:
            raise ValueError(f"no translation of the PTX instruction: {line}")
        value = made.format(*(self.operand(text, kind) for text in operands[1:]))
        result = "bool" if words[0] == "setp" else TYPES[kind]
        return [self.put(operands[0], f"{result}({value})")]

    def line(self, line: str) -> list[str]:
        """One line of a body."""
        if line in ("", "{", "}"):
            return []
        if match := re.fullmatch(r"\{\s*(\w.*;)\s*\}", line):  # inline assembly
            line = match[1]
        if match := re.fullmatch(r"\.reg \.(\w+)\s+%(\w+)<(\d+)>;", line):
            return [f"{TYPES[match[1]]} {match[2]}[{match[3]}];"]
        if match := re.fullmatch(r"(\$\w+):", line):
            return [f"{match[1].replace('$', '_')}:;"]
        match = re.fullmatch(r"(?:@(!?)%p(\d+) )?(.*);", line)
        if not match:
            raise ValueError(f"no translation of the PTX line: {line}")
        made = " ".join(self.instruction(match[3].strip()))
        return [f"if ({match[1]}p[{match[2]}]) {{ {made} }}" if match[2] else made]


def translate(ptx: str) -> tuple[str, list[str]]:
    """C++ with a function for each kernel, and the kernels' names in the functions' order.

    Kernel i becomes `run_i(argument, blocks, threads)`, which runs all threads of all blocks.
    """
    source = [PRELUDE]
    names = []
    text = re.sub(r"//.*", "", ptx)
    for match in re.finditer(
        r"\.entry (\w+)\(\s*\.param \.align \d+ \.b8 (\w+)\[\d+\]\s*\)[^{]*\{(.*?)^\}",
        text,
        re.DOTALL | re.MULTILINE,
    ):
        kernel = _Kernel()
        kernel.parameter = match[2]
        number = len(names)
        names.append(match[1])
        source.append(
            f"static void thread_{number}(char* argument, uint32_t block, uint32_t thread) {{"
        )
        for raw in match[3].splitlines():
            source += kernel.line(re.sub(r"\s+", " ", raw.strip()))
        source.append(f"}}\n{ALL_THREADS.replace('NUMBER', str(number))}")
    return "\n".join(source), names
