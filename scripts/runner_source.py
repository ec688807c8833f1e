"""A runner's inputs and output as schemas, by the rules of `cog build` 0.23: from its text, which is never run.

Where Cog would quietly drop or mangle something it cannot read, this refuses and says what to write instead.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

JSON_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
PYTHON_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}
# Cog's name for a property of an input, and JSON Schema's.
TEXT_OPTIONS = {"description": "description", "regex": "pattern"}
NUMBER_OPTIONS = {
    "ge": "minimum",
    "le": "maximum",
    "min_length": "minLength",
    "max_length": "maxLength",
}
OPTIONS = frozenset({"default", "choices", "deprecated", *TEXT_OPTIONS, *NUMBER_OPTIONS})

TYPE_HINT = "use str, int, float or bool, a list of one of them, or one of these `| None`"


Method = ast.FunctionDef | ast.AsyncFunctionDef


class SchemaError(Exception):
    """predict.py says something that cannot be turned into a schema without running it."""


@dataclass(frozen=True)
class FieldType:
    """The type of one input: `list[int] | None` is items="integer", repeated and optional."""

    items: str
    repeated: bool = False
    optional: bool = False

    def schema(self) -> dict[str, Any]:
        if self.repeated:
            return {"type": "array", "items": {"type": self.items}}
        return {"type": self.items}


class Reader:
    """Reads one module's text and resolves the few expressions that Cog resolves."""

    def __init__(self, source: str, filename: str) -> None:
        self.source = source
        self.filename = filename
        try:
            self.module = ast.parse(source, filename)
        except SyntaxError as error:
            raise SchemaError(f"{filename}:{error.lineno}: not valid Python: {error.msg}") from None
        self.constants = dict(self._constants())

    def refusal(self, node: ast.AST, reason: str) -> SchemaError:
        return SchemaError(f"{self.filename}:{getattr(node, 'lineno', '?')}: {reason}")

    def _constants(self) -> Iterator[tuple[str, ast.expr]]:
        for statement in self.module.body:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    yield name, value
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                    yield name, value

    def method(self, class_name: str, name: str) -> Method:
        for statement in self.module.body:
            if isinstance(statement, ast.ClassDef) and statement.name == class_name:
                for member in statement.body:
                    if isinstance(member, Method) and member.name == name:
                        return member
                raise self.refusal(statement, f"class {class_name} has no method {name}()")
        raise SchemaError(f"{self.filename}: there is no class {class_name} at the top level")

    def literal(self, node: ast.expr, what: str) -> Any:
        """The value of a literal, or of a module-level constant that holds one."""
        if isinstance(node, ast.Name):
            if node.id not in self.constants:
                raise self.refusal(
                    node,
                    f"{what}: `{node.id}` is not assigned a literal at the top level of this file; "
                    "`cog build` does not follow imports",
                )
            node = self.constants[node.id]
        match node:
            case ast.Constant(value=str()):
                return self._text(node, what)
            case ast.Constant(value=None | bool() | int() | float()):
                return node.value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                return -number
            case ast.List(elts=items) | ast.Tuple(elts=items):
                # Cog follows a name once, never a name inside a list.
                if any(isinstance(item, ast.Name) for item in items):
                    raise self.refusal(
                        node, f"{what}: `cog build` reads only literals inside a list"
                    )
                return [self.literal(item, what) for item in items]
        raise self.refusal(
            node,
            f"{what}: `{ast.unparse(node)}` cannot be resolved without running it; write a literal",
        )

    def _text(self, node: ast.Constant, what: str) -> str:
        # Cog takes the characters between the outer quotes as they stand: it decodes no escapes
        # and does not join adjacent literals. Only text that reads the same both ways is let through.
        segment = ast.get_source_segment(self.source, node)
        value = str(node.value)
        if segment not in [quote + value + quote for quote in ('"', "'", '"""', "'''")]:
            raise self.refusal(
                node,
                f"{what}: write one string literal without escapes, a prefix or adjacent literals; "
                "`cog build` would copy them into the schema as they are typed",
            )
        return value

    def choices(self, node: ast.expr, what: str) -> list[Any]:
        """A list, or `list(NAME.keys())`, or `list(NAME.values())` of a dict in this file."""
        match node:
            case ast.Call(
                func=ast.Name(id="list"),
                args=[
                    ast.Call(
                        func=ast.Attribute(value=ast.Name(id=name), attr="keys" | "values" as part),
                        args=[],
                    )
                ],
            ) if isinstance(table := self.constants.get(name), ast.Dict):
                members = table.keys if part == "keys" else table.values
                return [self.literal(member, what) for member in members if member is not None]
        values = self.literal(node, what)
        if not isinstance(values, list) or not values:
            raise self.refusal(node, f"{what}: choices must be a list with at least one value")
        return values

    def number(self, node: ast.expr, what: str) -> int | float:
        """A bound. Cog reads these as typed, and drops anything else without a word."""
        segment = ast.get_source_segment(self.source, node) or ""
        if not re.fullmatch(r"-?\d+(\.\d+)?([eE][+-]?\d+)?", segment):
            raise self.refusal(
                node,
                f"{what}: `{segment}` must be a plain decimal number; `cog build` drops a bound "
                "that is a name, an expression or has underscores",
            )
        # Cog keeps bounds as 64-bit floats: 2**63 - 1 becomes 2**63 there, and so it does here.
        value = float(segment)
        return int(value) if value.is_integer() else value


def read_type(reader: Reader, node: ast.expr, what: str) -> FieldType:
    match node:
        case ast.Name(id=name) if name in JSON_TYPES:
            return FieldType(JSON_TYPES[name])
        case ast.Subscript(value=ast.Name(id="list" | "List"), slice=inner):
            element = read_type(reader, inner, what)
            if not element.repeated and not element.optional:
                return FieldType(element.items, repeated=True)
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            element = read_type(reader, inner, what)
            return FieldType(element.items, element.repeated, optional=True)
        case (
            ast.BinOp(op=ast.BitOr(), left=inner, right=ast.Constant(value=None))
            | ast.BinOp(op=ast.BitOr(), left=ast.Constant(value=None), right=inner)
        ):
            element = read_type(reader, inner, what)
            return FieldType(element.items, element.repeated, optional=True)
        case ast.Name(id="Path" | "File"):
            raise reader.refusal(
                node,
                f"{what}: a Path or File input makes the server open whatever file or URL a caller "
                "names; take a string",
            )
        case ast.Subscript(value=ast.Name(id="Literal")):
            raise reader.refusal(
                node, f"{what}: Cog has no Literal inputs; use str with Input(choices=[...])"
            )
    raise reader.refusal(node, f"{what}: type `{ast.unparse(node)}` is not supported; {TYPE_HINT}")


def check_value(
    reader: Reader, node: ast.AST, value: Any, field_type: FieldType, what: str
) -> None:
    if value is None and field_type.optional:
        return
    for item in value if field_type.repeated and isinstance(value, list) else [value]:
        fits = isinstance(item, PYTHON_TYPES[field_type.items])
        if not fits or (isinstance(item, bool) and field_type.items != "boolean"):
            raise reader.refusal(node, f"{what}: {item!r} is not of type {field_type.items}")


def read_options(reader: Reader, default: ast.expr | None, what: str) -> dict[str, ast.expr]:
    """What stands after the `=`: the keywords of Input(...), or a plain default."""
    match default:
        case None:
            return {}
        case ast.Call(func=ast.Name(id="Input"), args=[], keywords=keywords):
            unknown = [keyword.arg for keyword in keywords if keyword.arg not in OPTIONS]
            if unknown:
                raise reader.refusal(default, f"{what}: Input({unknown[0]}=…) is not known here")
            return {keyword.arg: keyword.value for keyword in keywords if keyword.arg is not None}
        case ast.Call():
            raise reader.refusal(
                default, f"{what}: write the default as a literal or as Input(keyword=…, …)"
            )
    return {"default": default}


def read_input(
    reader: Reader, argument: ast.arg, default: ast.expr | None, order: int
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The property's schema, and the schema of its choices if it has any."""
    name = argument.arg
    what = f"input '{name}'"
    if argument.annotation is None:
        raise reader.refusal(argument, f"{what} has no type annotation; {TYPE_HINT}")
    field_type = read_type(reader, argument.annotation, what)
    options = read_options(reader, default, what)

    schema: dict[str, Any] = {"title": title_case(name), **field_type.schema()}
    choices_schema = None
    if "choices" in options:
        schema = {"allOf": [{"$ref": f"#/components/schemas/{name}"}]}
        choices_schema = read_choices(reader, options["choices"], name, field_type)
    if "default" in options:
        value = reader.literal(options["default"], f"{what}, default")
        # `seed: int = None` is what Cog calls "no default": the input stays required.
        if value is not None or field_type.optional:
            check_value(reader, options["default"], value, field_type, f"{what}, default")
            if choices_schema and value is not None and value not in choices_schema["enum"]:
                raise reader.refusal(options["default"], f"{what}: {value!r} is not a choice")
            schema["default"] = value
    if field_type.optional:
        schema["nullable"] = True
    for option, keyword in TEXT_OPTIONS.items():
        if option in options:
            text = reader.literal(options[option], f"{what}, {option}")
            check_value(reader, options[option], text, FieldType("string"), f"{what}, {option}")
            schema[keyword] = text
    for option, keyword in NUMBER_OPTIONS.items():
        if option in options:
            schema[keyword] = reader.number(options[option], f"{what}, {option}")
    if "deprecated" in options and reader.literal(options["deprecated"], f"{what}, deprecated"):
        schema["deprecated"] = True
    schema["x-order"] = order
    return schema, choices_schema


def read_choices(
    reader: Reader, node: ast.expr, name: str, field_type: FieldType
) -> dict[str, Any]:
    what = f"input '{name}', choices"
    choices = reader.choices(node, what)
    check_value(reader, node, choices, FieldType(field_type.items, repeated=True), what)
    return {
        "title": name,
        "description": "An enumeration.",
        "enum": choices,
        "type": field_type.items,
    }


def read_inputs(reader: Reader, method: Method) -> tuple[dict[str, Any], dict[str, Any]]:
    """The Input component, and one component for every input that has choices."""
    arguments = method.args
    if arguments.vararg or arguments.kwarg or arguments.posonlyargs or arguments.kwonlyargs:
        raise reader.refusal(method, f"{method.name}() may take named inputs only: no *, / or **")
    inputs = arguments.args[1:]  # without self
    defaults = [None] * (len(inputs) - len(arguments.defaults)) + list(arguments.defaults)
    properties: dict[str, Any] = {}
    components: dict[str, Any] = {}
    required: list[str] = []
    for order, (argument, default) in enumerate(zip(inputs, defaults, strict=True)):
        schema, choices_schema = read_input(reader, argument, default, order)
        properties[argument.arg] = schema
        if choices_schema is not None:
            components[argument.arg] = choices_schema
        if "default" not in schema and "nullable" not in schema:
            required.append(argument.arg)
    input_schema: dict[str, Any] = {"title": "Input", "type": "object", "properties": properties}
    if required:
        input_schema["required"] = required
    return input_schema, components


def read_output(reader: Reader, method: Method) -> dict[str, Any]:
    if method.returns is None:
        raise reader.refusal(
            method, f"{method.name}() has no return type; write -> list[str], for example"
        )
    match method.returns:
        case ast.Subscript(value=ast.Name(id="Iterator" | "AsyncIterator"), slice=inner):
            yielded = read_type(reader, inner, f"what {method.name}() yields")
            if yielded.repeated or yielded.optional:
                raise reader.refusal(method.returns, "Cog has iterators of single values only")
            array = FieldType(yielded.items, repeated=True).schema()
            return {"title": "Output", **array, "x-cog-array-type": "iterator"}
    field_type = read_type(reader, method.returns, f"the return type of {method.name}()")
    if field_type.optional:
        raise reader.refusal(method.returns, "Cog has no optional outputs")
    return {"title": "Output", **field_type.schema()}


def is_streaming(reader: Reader, method: Method) -> bool:
    """Whether callers may ask for an event stream, as `@streaming` says: the server knows it from the schema alone."""
    for decorator in method.decorator_list:
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        match called:
            case (
                ast.Name(id="streaming") | ast.Attribute(value=ast.Name(id="cog"), attr="streaming")
            ):
                break
    else:
        return False
    if "x-cog-array-type" not in read_output(reader, method):
        raise reader.refusal(method, "@streaming is for a run() that yields; return an iterator")
    return True


def title_case(name: str) -> str:
    return " ".join(word[:1].upper() + word[1:] for word in name.split("_"))
