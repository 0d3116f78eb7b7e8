"""Each class of flaw that LLM servers had: who may ask, what a template may do, what is written down."""

import base64
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foreroute.errors import ServerError
from foreroute.server.api.problems import ApiError
from foreroute.server.backend import Prompts
from foreroute.server.dialogue.templates import TemplateRenderer
from foreroute.server.settings import Limits, ServerSettings, check_exposure, host_name
from tests.server.conftest import Served

Serve = Callable[..., Served]
KEY, OTHER = "s3cret-key", "another-key"
BEARER = {"authorization": f"Bearer {KEY}"}


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/models", "//v1/models", "/V1/Models", "/v1%2fmodels", "/%76%31/models", "/metrics", "/version",
     "/tokenizer_info", "/openapi.json", "/", "/live", "/health/", "//health", "/HEALTH", "/health/../v1/models",
     "/health%2f..%2fv1%2fmodels", "/nowhere", "/docs"],
)  # fmt: skip
def test_no_path_leads_past_the_key(serve: Serve, path: str) -> None:
    client = serve(ServerSettings(api_keys=(KEY,))).client
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}, {"authorization": "Bearer"}):
        response = client.get(path, headers=headers)
        assert response.status_code == 401, path
        assert response.json()["error"]["type"] == "authentication_error"
        assert response.headers["www-authenticate"] == "Bearer"
    assert client.get(path, headers=BEARER).status_code in (200, 404)


def test_keys(serve: Serve) -> None:
    served = serve(ServerSettings(api_keys=(KEY, OTHER)))
    client = served.client
    assert client.get("/health").status_code == 200
    assert client.post("/health", json={}).status_code == 401
    assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 401
    assert served.engine.requests == []
    for key in (KEY, OTHER):
        assert client.get("/version", headers={"authorization": f"bearer {key}"}).status_code == 200
        basic = base64.b64encode(f"me:{key}".encode()).decode()
        assert client.get("/version", headers={"authorization": f"Basic {basic}"}).status_code == 200
    for wrong in (f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Basic ???", "Bearer \xff", f"Basic {KEY}"):
        assert client.get("/version", headers={"authorization": wrong.encode("latin-1")}).status_code == 401
    # A browser is told to ask for a password; a program is not.
    asked = client.get("/", headers={"accept": "text/html"})
    assert asked.headers["www-authenticate"].startswith("Basic ")
    assert KEY not in asked.text


def test_keys_are_compared_in_constant_time(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared: list[bytes] = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda given, key: compared.append(key) or real(given, key))
    client = serve(ServerSettings(api_keys=(KEY, OTHER))).client
    client.get("/version", headers=BEARER)
    # All of them, although the first one fits.
    assert compared == [KEY.encode(), OTHER.encode()]


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[::2]:80", "localhost:80@evil.example",
     "localhost:80:80", "::1", "[::1", "localhost:x", "localhost#", "127.1"],
)  # fmt: skip
def test_names_that_were_made_to_point_here(serve: Serve, host: str) -> None:
    response = serve().client.get("/v1/models", headers={"host": host})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "wrong_host"


@pytest.mark.parametrize("host", ["localhost", "LocalHost:8000", "127.0.0.1:1", "[::1]:8000"])
def test_names_of_this_machine(serve: Serve, host: str) -> None:
    assert serve().client.get("/v1/models", headers={"host": host}).status_code == 200


def test_hosts_elsewhere(serve: Serve) -> None:
    open_to_all = ServerSettings(host="0.0.0.0", api_keys=(KEY,))
    assert serve(open_to_all).client.get("/version", headers={**BEARER, "host": "box.lan"}).status_code == 200


def test_the_names_that_a_proxy_is_reached_by(serve: Serve) -> None:
    named = frozenset({"llm.example.org", "[2001:db8::1]"})
    origin, json_type = {"origin": "https://llm.example.org"}, {"content-type": "application/json"}
    for settings in (ServerSettings(allowed_hosts=named), ServerSettings(host="0.0.0.0", allowed_hosts=named)):
        client = serve(settings).client
        for host in ("llm.example.org", "LLM.example.org:8443", "[2001:db8::1]:80", "localhost:8000", settings.host):
            assert client.get("/v1/models", headers={"host": host}).status_code == 200, host
        for host in ("example.org", "llm.example.org.evil.example", "evil-llm.example.org", "[2001:db8::2]"):
            response = client.get("/v1/models", headers={"host": host})
            assert response.json()["error"]["code"] == "wrong_host", host
        # A proxy may leave the name that people know in Host, or put its own there.
        for host in ("llm.example.org", "127.0.0.1:8000"):
            headers = {"host": host, **json_type}
            post = client.post("/v1/completions", content=b'{"prompt": "a"}', headers={**headers, **origin})
            assert post.status_code == 200, post.text
            for other in ("https://example.org", "https://llm.example.org:9", "http://[2001:db8::2]", "null"):
                post = client.post("/v1/completions", content=b'{"prompt": "a"}', headers={**headers, "origin": other})
                assert post.json()["error"]["code"] == "wrong_origin", other


def test_a_proxy_on_another_port(serve: Serve) -> None:
    """Its name may be in Host with any port and with none; pages come from that port alone."""
    client = serve(ServerSettings(allowed_hosts=frozenset({"llm.example.org:8443"}))).client
    for host in ("llm.example.org", "llm.example.org:8443", "127.0.0.1:8000"):
        seen = {}
        for origin in ("https://llm.example.org:8443", "https://llm.example.org:9", "https://evil.example:8443"):
            seen[origin] = client.get("/version", headers={"host": host, "origin": origin}).status_code
        assert list(seen.values()) == [200, 403, 403], (host, seen)
    assert client.get("/version", headers={"host": "evil.example:8443"}).status_code == 403


def test_names_of_hosts() -> None:
    assert [host_name(one) for one in ("LLM.Example.org", "box", "::1", "[2001:DB8:0::1]", "10.0.0.1")] == [
        "llm.example.org", "box", "[::1]", "[2001:db8::1]", "10.0.0.1",
    ]  # fmt: skip
    assert [host_name(one) for one in ("Box:8443", "[::1]:81", "2001:db8::1:8443", "::1:81", "box:443", "box:80")] == [
        "box:8443", "[::1]:81", "[2001:db8::1:8443]", "[::1:81]", "box", "box",
    ]  # fmt: skip
    for port in ("a:0", "a:65536"):
        with pytest.raises(ServerError, match="from 1 to 65535"):
            host_name(port)
    for wrong in (
        "", "https://a", "a:", "a:b", "a:1:2", "a:123456", "a/b", "*", "*.example.org", "a b", "a,b", "-a", "a.", "é",
    ):  # fmt: skip
        with pytest.raises(ServerError, match="not a host name"):
            host_name(wrong)


def test_pages_of_other_sites(serve: Serve) -> None:
    served = serve()
    body = b'{"prompt": "a"}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        response = served.client.post("/v1/completions", content=body, headers={"content-type": kind})
        assert response.status_code == 415
        assert response.json()["error"]["code"] == "wrong_content_type"
    json_type = {"content-type": "application/json; charset=utf-8"}
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9999", "http://["):
        headers = {**json_type, "origin": origin}
        assert served.client.post("/v1/completions", content=body, headers=headers).status_code == 403
    assert served.engine.requests == []
    own = {**json_type, "origin": "http://127.0.0.1:8000"}
    response = served.client.post("/v1/completions", content=body, headers=own)
    assert response.status_code == 200
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_exposure() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        check_exposure(host, (), is_insecure=False)
    for host in ("0.0.0.0", "::", "192.168.0.5", "box.lan"):
        with pytest.raises(ServerError, match="--api-key"):
            check_exposure(host, (), is_insecure=False)
        check_exposure(host, (KEY,), is_insecure=False)
        check_exposure(host, (), is_insecure=True)
    for key in ("", "a b", "ключ", "a\n"):
        with pytest.raises(ServerError, match="printable"):
            check_exposure("127.0.0.1", (key,), is_insecure=False)


def test_prompts_and_keys_are_not_written_down(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    served = serve(ServerSettings(api_keys=(KEY,)))
    served.client.headers.update(BEARER)
    served.chat("a private matter")
    served.chat("a private matter", stream=True)
    served.chat("a private matter", temperature=9)
    served.complete("a private matter " * 20)
    served.engine.error = "failed"
    served.chat("a private matter")
    served.client.get("/version", headers={"authorization": "Bearer not-the-key"})
    own = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    logged = " ".join(f"{record.getMessage()} {record.exc_text}" for record in own)
    assert "private" not in logged
    assert KEY not in logged
    assert "not-the-key" not in logged


@pytest.fixture(scope="module")
def render() -> Any:
    """`render(template, messages)`, each with little time and memory."""
    limits = Limits(template_s=1.0, template_bytes=128 * 2**20, template_chars=100_000)
    renderer = TemplateRenderer("", {"eos_token": "<end>"}, limits)

    def rendering(template: str, text: str = "Hi") -> str:
        # One process for them all, as starting it is what takes the time.
        renderer._template = template
        return renderer.render([{"role": "user", "content": text}])

    yield rendering
    renderer.close()


def test_a_template_sees_messages_and_special_tokens(render: Any) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}{{ add_generation_prompt }}"
    )
    assert render(template, "é漢") == "user:é漢<end>True"
    assert render(template, "{{ 7 * 7 }}{% for %}") == "user:{{ 7 * 7 }}{% for %}<end>True"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for a in range(30000) %}{% for b in range(30000) %}{% endfor %}{% endfor %}", "takes more than 1 s"),
        ("{% for a in range(2000) %}{{ 'x' * 100000 }}{% endfor %}", "memory"),
        ("{{ 'x' * 200000000 }}", "memory"),
        ("{{ 'x' * 200000 }}", "more than 100,000 characters"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages[0].content.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "loader"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "itself without end"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% if %}", "Expected"),
    ],
)
def test_what_a_template_may_not_do(render: Any, template: str, why: str) -> None:
    began = time.monotonic()
    with pytest.raises(ApiError, match="chat template refuses") as refused:
        render(template)
    assert why in refused.value.message
    assert refused.value.status == 400
    # Not a measurement: 3e7 rounds, or as many characters, would take minutes.
    assert time.monotonic() - began < 60


def test_after_a_bad_rendering_comes_a_good_one(render: Any) -> None:
    template = (
        "{% if messages[0].content == 'loop' %}{% for a in range(30000) %}{% for b in range(30000) %}"
        "{% endfor %}{% endfor %}{% endif %}fine"
    )
    with pytest.raises(ApiError, match="more than 1 s"):
        render(template, "loop")
    assert render(template) == "fine"
    # Larger than what a pipe holds, in both directions.
    assert len(render("{{ messages[0].content }}", "x" * 99_999)) == 99_999


def test_a_server_with_a_thousand_connections() -> None:
    """`select` takes no descriptor past 1023, and a worker that is started late has such."""
    nobody = os.open(os.devnull, os.O_RDONLY)
    held = [nobody]
    renderer = TemplateRenderer("{{ messages[0].content }}", {}, Limits())
    try:
        while held[-1] < 1100:
            held.append(os.dup(nobody))
        assert renderer.render([{"role": "user", "content": "Hi"}]) == "Hi"
        assert renderer._worker is not None
        assert renderer._worker.stdout is not None
        assert renderer._worker.stdout.fileno() > 1023
    finally:
        renderer.close()
        for one in held:
            os.close(one)


def test_the_worker_knows_no_keys(monkeypatch: pytest.MonkeyPatch, render: Any) -> None:
    monkeypatch.setenv("FOREROUTE_API_KEY", KEY)
    renderer = TemplateRenderer("x", {}, Limits())
    renderer.start()
    worker = renderer._worker
    assert worker is not None
    assert KEY.encode() not in Path(f"/proc/{worker.pid}/environ").read_bytes()
    renderer.close()
    assert worker.poll() is not None
    with pytest.raises(ApiError, match="shutting down"):
        renderer.render([])


def test_a_request_does_not_reach_the_template(serve: Serve, byte_tokenizer: Any) -> None:
    import copy

    leaky = copy.deepcopy(byte_tokenizer)
    leaky.chat_template = "[{{ user }}{{ seed }}{{ custom }}{{ messages[0].extra }}]"
    prompts = Prompts(leaky, 260, Limits())
    served = serve(own_prompts=prompts)
    assert served.chat(user="me", seed=5).status_code == 200
    sent = served.engine.requests[-1].prompt_ids
    assert leaky.decode(list(sent)) == "[]"
    assert (
        served.client.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": "a", "extra": "b"}]}
        ).status_code
        == 400
    )
    prompts.close()


def test_a_developers_message_is_not_lost(serve: Serve, byte_tokenizer: Any) -> None:
    """Templates that do not know the role leave such messages out without a word, Qwen3's among them."""
    import copy

    shown = "{% if m.role in ['system', 'developer', 'user'] %}{{ m.role[0] }}{% endif %}"
    knowing = "{% for m in messages %}" + shown + "{% endfor %}"
    for template, rendered in ((knowing.replace("'developer', ", ""), "su"), (knowing, "du")):
        tokenizer = copy.deepcopy(byte_tokenizer)
        tokenizer.chat_template = template
        prompts = Prompts(tokenizer, 260, Limits())
        served = serve(own_prompts=prompts)
        messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        assert served.client.post("/v1/chat/completions", json={"messages": messages}).status_code == 200
        assert tokenizer.decode(list(served.engine.requests[-1].prompt_ids)) == rendered
        prompts.close()


def test_no_template_no_chat(serve: Serve, byte_tokenizer: Any) -> None:
    import copy

    plain = copy.deepcopy(byte_tokenizer)
    plain.chat_template = None
    served = serve(own_prompts=Prompts(plain, 260, Limits()))
    response = served.chat()
    assert response.status_code == 400
    assert "no chat template" in response.json()["error"]["message"]


def test_loading_a_model_runs_no_code_of_its_own() -> None:
    """The server loads as every command does: no flag of its command line lets remote code run."""
    import inspect

    from foreroute.cli.commands import serve as command

    assert "trust_remote_code" not in inspect.getsource(command)


def test_files_of_the_working_folder_are_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cd MODEL; foreroute serve .`: a checkpoint's folder may hold anything, and nothing of it may run."""
    for name in ("json", "jinja2", "transformers", "foreroute", "resource"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise SystemExit\n")
    monkeypatch.chdir(tmp_path)
    renderer = TemplateRenderer("{{ messages[0].content }}", {}, Limits())
    try:
        assert renderer.render([{"role": "user", "content": "Hi"}]) == "Hi"
    finally:
        renderer.close()
    assert not (tmp_path / "ran").exists()
