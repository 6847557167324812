"""How `rookery data preview` shows what it found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rookery.i18n import N_, _

if TYPE_CHECKING:
    from rich.text import Text

    from rookery.data.preview import Preview, Row, Span

BAR = 40
"""Characters of the longest bar."""

TRAINED = {
    "answer": N_("what the assistant says"),
    "none": N_("everything"),
    "pad": N_("everything"),
    "qa": N_("everything from Assistant: to User:"),
    "se": N_("everything between the marks of mask_id"),
}
"""What a `loss_mask` trains."""


def print_preview(found: Preview) -> None:
    """Print the first documents and the counts. Trained tokens are green, or in brackets where there are no colours."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    coloured = console.color_system is not None and not console.no_color
    for row in found.rows:
        said = {"number": row.number, "tokens": row.tokens, "trained": row.trained}
        heading = _("document {number}: {tokens} tokens, {trained} of them trained", **said)
        console.print(Text(f"── {heading}", "cyan"))
        console.print(_document(row, coloured))
    if found.rows:
        legend = _("green: trained") if coloured else _("⟦ ⟧: trained")
        console.print(Text(f"── {legend}", "cyan"))
    for line in _counts(found):
        console.print(Text(line))
    for label, documents, bar, too_long in _histogram(found):
        console.print(Text.assemble(f"{label:>15} {documents:>9,}  ", (bar, "red" if too_long else "green")))
    for line in _problems(found):
        console.print(Text(line))


def _document(row: Row, coloured: bool) -> Text:
    from rich.text import Text

    text = Text()
    for trained, spans in _runs(row.spans):
        shown = "".join(map(_shown, spans))
        if trained:
            text.append(shown if coloured else f"⟦{shown}⟧", "green" if coloured else "")
        else:
            text.append(shown, "dim" if coloured else "")
    return text


def _runs(spans: list[Span]) -> Iterator[tuple[bool, list[Span]]]:
    """Spans that are alike, together."""
    run: list[Span] = []
    for span in spans:
        if run and run[0].trained != span.trained:
            yield run[0].trained, run
            run = []
        run.append(span)
    if run:
        yield run[0].trained, run


def _shown(span: Span) -> str:
    if span.kind == "end":
        return "<|endoftext|>"
    if span.kind == "gap":
        return "\n" + _("… {count} tokens not shown …", count=span.text) + "\n"
    if span.kind == "cut":
        return "\n" + _("✂ cut here: {count} more tokens", count=span.text)
    return span.text


def _counts(found: Preview) -> Iterator[str]:
    reading = {
        "data_type": found.data_type,
        "data_format": found.data_format if found.data_type == "jsonl" else "",
        "template": found.template,
        "dataload": found.dataload,
        "ctx_len": found.ctx_len,
    }
    yield f"{found.file}: " + ", ".join(f"{name} {value}" for name, value in reading.items() if value)
    yield _("trained (loss_mask {name}): {what}", name=found.loss_mask, what=_(TRAINED[found.loss_mask]))
    if not found.complete:
        yield _("only the beginning was looked at; --all looks at everything")
    yield _(
        "{documents} documents, {tokens} tokens, {trained} trained ({share})",
        documents=f"{found.documents:,}",
        tokens=f"{found.tokens:,}",
        trained=f"{found.trained:,}",
        share=f"{found.trained / max(1, found.tokens):.1%}",
    )
    if found.documents:
        yield _(
            "documents have {shortest} to {longest} tokens, {mean:.1f} on average, half no more than {median:.0f}:",
            shortest=found.shortest,
            longest=found.longest,
            mean=found.mean,
            median=found.median,
        )


def _histogram(found: Preview) -> Iterator[tuple[str, int, str, bool]]:
    """Of each bin its label, documents, bar, and whether they are longer than a sample."""
    most = max((entry.documents for entry in found.histogram), default=1)
    for entry in found.histogram:
        bar = "█" * -(-BAR * entry.documents // most)
        yield f"{entry.first}–{entry.last}", entry.documents, bar, entry.cut > 0


def _problems(found: Preview) -> Iterator[str]:
    said = {"count": found.longer, "share": f"{found.longer / max(1, found.documents):.1%}", "ctx_len": found.ctx_len}
    if found.cut:
        yield _("{count} documents ({share}) are longer than ctx_len {ctx_len} and will be cut there", **said)
    elif found.longer:
        yield _(
            "{count} documents ({share}) are longer than ctx_len {ctx_len}; dataload get reads on in the next sample",
            **said,
        )
    if found.left_out:
        yield _(
            "{count} documents have nothing to train within ctx_len {ctx_len} and will be left out",
            count=found.left_out,
            ctx_len=found.ctx_len,
        )
    if found.thoughts_lost:
        yield _(
            "{count} conversations have thoughts, which template world leaves out; template g1 keeps them",
            count=found.thoughts_lost,
        )
    if found.fault_count:
        yield _("{count} lines are no documents, and training would stop at them:", count=found.fault_count)
        yield from (f"  {fault}" for fault in found.faults)
        if found.fault_count > len(found.faults):
            yield "  " + _("and {count} more", count=found.fault_count - len(found.faults))
