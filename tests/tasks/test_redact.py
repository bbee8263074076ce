"""What is hidden when settings are logged, and what is not."""

from __future__ import annotations

import pytest

from evaclip_model.errors import InputError
from flows.reporting.terminal import console
from tasks.evaluate.report.templates import MACROS
from tasks.redact import redact_settings, redact_text
from tasks.table import Table, markdown_table, terminal_table, words
from tasks.tracking import TrackingStore


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:pw@host:5000", "http://me:***@host:5000"),
        ("postgresql+psycopg2://u:p%40s@db/mlflow", "postgresql+psycopg2://u:***@db/mlflow"),
        ("s3://b/k?X-Amz-Signature=ab12&X-Amz-Date=1", "s3://b/k?X-Amz-Signature=***&X-Amz-Date=1"),
        ("https://h/x?access_token=t#f", "https://h/x?access_token=***#f"),
        ('{"files": "https://a:b@h/*.parquet"}', '{"files": "https://a:***@h/*.parquet"}'),
        ("Authorization: Bearer abcdefghijklmnop", "Authorization: Bearer ***"),
        ('{"api_key": "abc", "n": 1}', '{"api_key": "***", "n": 1}'),
        ("AccountName=a;AccountKey=Zm9v==;E=x", "AccountName=a;AccountKey=***;E=x"),
        (f"id AKIA{16 * 'A'} and hf_{30 * 'a'}", "id *** and ***"),
        ("-----BEGIN RSA PRIVATE KEY-----\nab\n-----END RSA PRIVATE KEY-----\nx", "***\nx"),
        ("aws_secret_access_key = wJalr/K7+x", "aws_secret_access_key = ***"),
        ("AWS_SESSION_TOKEN=FwoGZ", "AWS_SESSION_TOKEN=***"),
        (f"ya29.{20 * 'a'} GOCSPX-{24 * 'a'} AIza{35 * 'a'}", "*** *** ***"),
        (f"ghp_{36 * 'a'} ghr_{36 * 'a'} github_pat_{30 * 'a'}", "*** *** ***"),
        (f"xoxb-{12 * '1'}-a xoxe.xoxp-1-{9 * 'a'} xapp-1-{9 * 'a'}", "*** *** ***"),
        ("https://hooks.slack.com/services/T0/B0/XX", "https://hooks.slack.com/services/***"),
        (
            f"api_org_{34 * 'a'} npm_{36 * 'a'} pypi-{20 * 'a'} sk_live_{20 * 'a'}",
            "*** *** *** ***",
        ),
        (f"https://{30 * 'a'}@github.com/x", "https://***@github.com/x"),
        ("postgresql://me:p@s's@db/x", "postgresql://me:***@db/x"),
        ("authorization: basic YTpi", "authorization: basic ***"),
        ("X-Api-Key: 0123abc, password: hunter2", "X-Api-Key: *** password: ***"),
        ("password='hun ter2' --token abc", "password='***' --token ***"),
        ("PREFECT_API_AUTH_STRING=evaclip:ab", "PREFECT_API_AUTH_STRING=***"),
        ("-----BEGIN PGP PRIVATE KEY BLOCK-----\nab", "***"),
        (
            "a basic understanding of a signature: none",
            "a basic understanding of a signature: none",
        ),
        ("tokenizer=clip design=3 s3://b/k@1", "tokenizer=clip design=3 s3://b/k@1"),
        ("a basic model, a token: one of many", "a basic model, a token: one of many"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("merge.sources.a.files=s3://bucket/x", "merge.sources.a.files=s3://bucket/x"),
        ("train.stage1.text_tokens=77", "train.stage1.text_tokens=77"),
    ],
)
def test_passwords_and_tokens_are_hidden_and_nothing_else(text: str, shown: str) -> None:
    assert redact_text(text) == shown
    assert redact_text(shown) == shown


def test_what_is_called_a_secret_is_hidden_whole() -> None:
    given = {"db": {"password": "hunter2", "text_tokens": "77", "token": ""}, "api-key": "k"}
    shown = {"db": {"password": "***", "text_tokens": "77", "token": ""}, "api-key": "***"}
    assert redact_settings(given) == shown


def test_every_text_of_nested_settings_is_looked_at() -> None:
    nested = {"a": [{"b": "http://u:p@h"}], "c": 3, "d": None}
    assert redact_settings(nested) == {"a": [{"b": "http://u:***@h"}], "c": 3, "d": None}


def test_a_password_in_the_tracking_address_is_refused_without_being_repeated() -> None:
    with pytest.raises(InputError, match=r"holds a password: .*MLFLOW_TRACKING_PASSWORD") as error:
        TrackingStore.at("http://admin:hunter2@host:5000", "x")
    assert "hunter2" not in str(error.value)


def test_text_of_others_reaches_the_terminal_without_control_characters() -> None:
    with console.capture() as shown:
        console.print("name \x1b[2J\x1b]0;title\x07 \u202eabc\n\tnext", markup=False)
    assert shown.get() == "name \\x1b[2J\\x1b]0;title\\x07 \\u202eabc\n        next\n"


def test_a_name_of_others_in_a_table_moves_no_cursor_and_is_no_markup() -> None:
    table = Table.of("set", words("why"))
    table.add("\x1b[2Jset", "[red]<b>|\u202egpj")
    with console.capture() as shown:
        console.print(terminal_table(table))
    for text in (shown.get(), markdown_table(table), str(MACROS.html_table(table))):
        assert "\x1b" not in text and "\u202e" not in text and "[2Jset" in text.replace("\\[", "[")
    assert "[red]<b>|" in shown.get()
    assert "<b>" not in markdown_table(table) + str(MACROS.html_table(table))
