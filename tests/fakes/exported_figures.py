"""What a gateway exports at /metrics, and whether a query in PromQL speaks of it."""

import re

from prometheus_client.parser import text_string_to_metric_families
from promql_parser import (
    AggModifierType,
    AggregateExpr,
    BinaryExpr,
    Call,
    Expr,
    MatchOp,
    MatrixSelector,
    NumberLiteral,
    ParenExpr,
    StringLiteral,
    UnaryExpr,
    VectorSelector,
    parse,
)

GIVEN_BY_PROMETHEUS = {"instance", "job"}  # to whatever it scrapes


class ExportedFigures:
    """Samples by name, each with its labels and the values that they had."""

    def __init__(self, exposition: str) -> None:
        self._samples: dict[str, dict[str, set[str]]] = {}
        for family in text_string_to_metric_families(exposition):
            for sample in family.samples:
                labels = self._samples.setdefault(sample.name, {})
                for label, value in sample.labels.items():
                    labels.setdefault(label, set()).add(value)

    def labels_of(self, name: str) -> set[str]:
        assert name in self._samples, f"there is no {name}"
        return set(self._samples[name]) | GIVEN_BY_PROMETHEUS

    def result_labels(self, query: str) -> set[str]:
        """The labels that the query's result has. Fails where the query is no PromQL, or speaks of a figure, a label or
        a value that there is not."""
        return self._labels(parse(query))

    def _labels(self, expr: Expr) -> set[str]:
        match expr:
            case VectorSelector():
                return self._selected(expr)
            case MatrixSelector():
                return self._selected(expr.vector_selector)
            case Call():
                labels = set().union(*(self._labels(argument) for argument in expr.args))
                return labels - {"le"} if expr.func.name == "histogram_quantile" else labels
            case AggregateExpr():
                return self._kept(expr)
            case BinaryExpr():
                return self._labels(expr.lhs) | self._labels(expr.rhs)
            case ParenExpr() | UnaryExpr():
                return self._labels(expr.expr)
            case NumberLiteral() | StringLiteral():
                return set()
        raise AssertionError(f"{type(expr).__name__} is not looked into yet: {expr.prettify()}")

    def _kept(self, expr: AggregateExpr) -> set[str]:
        labels = self._labels(expr.expr)
        if expr.modifier is None:
            return set()
        assert expr.modifier.type == AggModifierType.By, expr.prettify()
        kept = set(expr.modifier.labels)
        assert kept <= labels, f"{expr.prettify()}: {kept - labels} is none of {sorted(labels)}"
        return kept

    def _selected(self, selector: VectorSelector) -> set[str]:
        labels = self.labels_of(selector.name or "")
        for matcher in selector.matchers.matchers:
            assert matcher.name in labels, f"{selector.name} has no label {matcher.name}"
            known = self._samples[selector.name or ""].get(matcher.name, set())
            if matcher.op == MatchOp.Equal:
                assert matcher.value in known, f"{selector.name}: {matcher.name} is never {matcher.value!r}"
            elif matcher.op == MatchOp.Re:
                for value in filter(str.isalnum, matcher.value.split("|")):  # alternatives; patterns may match none yet
                    assert any(re.fullmatch(value, one) for one in known), f"{matcher.name} is never {value!r}"
        return labels
