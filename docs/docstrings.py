"""Docstrings as griffe reads them: "k, v: text" describes k and describes v."""

import re

import griffe

GROUP = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+): (?P<text>.*(?:\n(?P=indent) +.*)*)", flags=re.MULTILINE)


class Groups(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is not None:
            before, args, after = obj.docstring.value.partition("Args:\n")
            obj.docstring.value = before + args + GROUP.sub(_one_by_one, after)


def _one_by_one(group: re.Match) -> str:
    return "\n".join(f"{group['indent']}{name}: {group['text']}" for name in group["names"].split(", "))
