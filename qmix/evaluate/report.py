"""The document of an evaluation, for people: a few lines and a table by position."""

from __future__ import annotations

from typing import Any


def lines(document: dict[str, Any]) -> dict[str, Any]:
    """What render.document prints instead of `document`."""
    found: dict[str, Any] = {"model": _name(document["model"])}
    if "text" in document:
        found |= _text(document)
    if "tasks" in document:
        found["tasks"] = [{key: "-" if value is None else value for key, value in row.items()}
                          for row in document["tasks"]]
    return found


def _text(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if compared := document["reference"] is not None:
        found["reference"] = _name(document["reference"])
    found |= {"text": f"{document['text']}, {document['text_tokens']} tokens",
              "scored": f"{document['tokens']} tokens in {document['windows']} windows of {document['window']}, a new "
                        f"one every {document['stride']}",
              "perplexity": f"{document['perplexity']:.4f}"}
    if compared:
        found["perplexity"] += f" (reference {document['reference_perplexity']:.4f})"
        found |= {"KL divergence": f"{document['kl_mean']:.6f} nats a token, 99 % of the tokens at most "
                                   f"{document['kl_p99']:.5f}",
                  "same top token": f"{100 * document['top1']:.2f} %"}
    found["by position in the window"] = [_row(row) for row in document["positions"]]
    return found


def _row(row: dict[str, Any]) -> dict[str, Any]:
    cells = {"position": f"{row['first']} to {row['last']}", "tokens": row["tokens"], "loss": row["loss"]}
    return cells | ({"KL": row["kl_mean"], "same top %": 100 * row["top1"]} if "kl_mean" in row else {})


def _name(about: dict[str, Any]) -> str:
    if "run_by" in about:
        how = about["run_by"]
        return (f"{about['checkpoint']}, unquantized, by transformers {how['transformers']} in {how['computed_in']}")
    return f"{about['store']}, {about['bits_per_weight']} bits a weight"
