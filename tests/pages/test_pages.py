"""Pages: numbers equal to jaxinv's own, names escaped, nothing loaded; drawn by a real browser."""

import base64
import functools
import hashlib
import html.parser
import json
import pathlib
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinv
from jaxinv import cli, networks
from jaxinv.errors import InvalidInput, JaxinvError
from jaxinv.experiments import files
from jaxinv.inspection import unit_balance
from jaxinv.pages import describe, experiment_page, model_page

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)  # fmt: skip  # noqa: E501
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
EVIL = "</script><script>document.title='evil'</script><img src=x onerror=alert(1)>"


def evil_net(w, x):
    return jnp.tanh(jax.nn.relu(x @ w["in"]) @ w[EVIL]) @ w["out"]


class Page(html.parser.HTMLParser):
    """Tags and attributes, the text by id and by data-field, and what was logged."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.fields, self.stack, self.cells = [], {}, {}, [], {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in ("meta", "img", "link", "br", "input"):
            self.stack.append((tag, attributes))
        table = [a["id"] for t, a in self.stack if t == "table"]
        if table and tag == "tr":
            self.cells.setdefault(table[-1], []).append([])
        if table and tag in ("td", "th"):
            self.cells[table[-1]][-1].append("")

    def handle_endtag(self, tag):
        while self.stack and self.stack.pop()[0] != tag:
            pass

    def handle_data(self, data):
        for _, attributes in self.stack:
            for key, place in (("id", self.text), ("data-field", self.fields)):
                if key in attributes:
                    place[attributes[key]] = place.get(attributes[key], "") + data
        if self.stack and self.stack[-1][0] in ("td", "th"):
            table = [a["id"] for t, a in self.stack if t == "table"][-1]
            self.cells[table][-1][-1] += data

    def rows(self, table):
        """The cells of a table, row by row."""
        return self.cells[table]

    def count(self, tag, **wanted):
        return sum(
            t == tag and all(a.get(k.replace("_", "-")) == v for k, v in wanted.items())
            for t, a in self.tags
        )


def embedded(text):
    return json.loads(Page(text).text["data"])


@pytest.fixture(scope="module")
def mlp():
    w = networks.init_mlp(jax.random.key(0), (3, 5, 4, 2), bias_std=0.5)
    return networks.mlp, w, jax.random.normal(jax.random.key(1), (60, 3))


@pytest.fixture(scope="module")
def page(mlp):
    return model_page(*mlp, title="a <b> & co")


def test_the_numbers_in_the_page_are_those_of_jaxinv(mlp, page):
    data = embedded(page)
    w, group = mlp[1], jaxinv.rescaling_group(*mlp)
    assert data["parameters"] == 54 and data["group"]["dimension"] == group.dim == 9
    of = (jaxinv.path_norm, jaxinv.unit_path_norms, jaxinv.log_path_kappa)
    norm, units, kappa = jax.jit(lambda w: [function(mlp[0], w, mlp[2]) for function in of])(w)
    assert data["log10_path_norm"] == pytest.approx(np.log10(norm), rel=1e-5)
    np.testing.assert_allclose(data["outputs"]["y"], units, rtol=1e-5)
    freedom = data["freedom"]
    found = jaxinv.degrees_of_freedom(*mlp)
    for part in ("rank", "rescaling", "dead", "unexplained"):
        assert freedom[part] == getattr(found, part)
    assert freedom["inputs"] == "the 60 given inputs"
    spectrum = np.asarray(jaxinv.jacobian_spectrum(*mlp))
    np.testing.assert_allclose(freedom["spectrum"], spectrum, rtol=1e-5, atol=1e-12)
    rank = int(found.rank)
    assert spectrum[rank] < 1e-9 < spectrum[rank - 1]
    leaf = next(x for x in data["leaves"] if x["name"] == "Dense_1/kernel")
    assert leaf["shape"] == [5, 4] and leaf["units"] == 4
    assert leaf["norm"] == pytest.approx(np.linalg.norm(w["Dense_1"]["kernel"]), rel=1e-5)
    kappa = np.asarray(kappa["Dense_1"]["kernel"]) / np.log(10)
    assert leaf["log10_kappa"] == pytest.approx(np.median(kappa), rel=1e-4)
    units = data["picture"]["units"]
    ratio = dict(zip(units["name"], units["ratio"], strict=True))
    for name, r in zip(group.names, unit_balance(group, w), strict=True):
        assert ratio[name] == pytest.approx(r, rel=1e-5)
    assert sum(sum(p["counts"]) for p in data["kappa"]["parts"]) == 54


def test_the_page_is_the_same_every_time_and_loads_nothing(mlp, page):
    assert model_page(*mlp, title="a <b> & co") == page
    parsed = Page(page)
    assert not any(k in ("src", "href") for _, a in parsed.tags for k in a)
    assert set(re.findall(r"https?://[^\s\"'`)]+", page)) == {"http://www.w3.org/2000/svg"}


def test_names_do_not_become_markup():
    w = {"in": jnp.ones((2, 3)), EVIL: jnp.ones((3, 4)), "out": jnp.ones((4, 1))}
    x = jax.ShapeDtypeStruct((1, 2), jnp.float32)
    text = model_page(evil_net, w, x, title=EVIL, rank_limit=0)
    assert Page(text).count("script") == 2 and Page(text).count("img") == 0
    data = embedded(text)
    assert data["title"] == EVIL and EVIL in [leaf["name"] for leaf in data["leaves"]]
    assert "tanh" in data["refused"] and data["log10_path_norm"] is None and data["kappa"] is None
    assert data["freedom"]["refused"].startswith("not computed: 22 parameters and 44 rows, both")


def few(count=16):
    w = networks.init_mlp(jax.random.key(0), (5, 8, 3), bias_std=0.1)
    return networks.mlp, w, jax.random.normal(jax.random.key(1), (count, 5))


def test_the_inputs_that_were_given_are_counted_on_and_what_they_do_not_reach_is_unseen():
    found = describe(*few(), rank_limit=2000)["freedom"]
    assert found["inputs"] == "the 16 given inputs"
    assert (found["rank"], found["unseen"], found["unexplained"]) == (48, 19, 0)
    assert found["notes"] == ["limited by 48 rows: at least 25 inputs needed for 75 parameters"]
    on_all = found["everywhere"]
    assert (on_all["lower"], on_all["upper"], on_all["certain"]) == (67, 67, True)


def test_beyond_the_limit_there_is_a_rank_on_few_rows_and_a_proof_on_all_inputs():
    found = describe(*few(4), rank_limit=20)["freedom"]
    assert found["rank"] == 12 and "spectrum" not in found and found["inputs"].startswith("the 4")
    assert found["everywhere"]["lower"] == 67
    found = describe(*few(), rank_limit=1)["freedom"]
    assert found["refused"].startswith("not computed: 75 parameters and 48 rows")
    assert found["everywhere"]["refused"].startswith("not computed: 75 parameters")


def test_a_rank_on_given_and_random_inputs_bounds_the_rank_on_all():
    def fn(w, x):
        return jax.nn.relu(x @ w["in"] * w["gain"]) @ w["out"]

    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"in": (3, 4), "gain": (4,), "out": (4, 2)}
    w = {n: jax.random.normal(k, shape) for k, (n, shape) in zip(keys, shapes.items(), strict=True)}
    found = describe(fn, w, jax.random.normal(jax.random.key(1), (3, 3)), rank_limit=100)["freedom"]
    assert found["rank"] <= 6 and found["unseen"] > 0
    on_all = found["everywhere"]
    assert found["rank"] + found["unseen"] <= on_all["lower"] <= on_all["upper"] == 16


@pytest.mark.parametrize(
    ("max_bytes", "by"),
    [(2e9, "the Jacobian at inputs that a search found"), (1, "a Cholesky factorisation")],
)
def test_a_smooth_network_gets_a_count_on_all_inputs(max_bytes, by, monkeypatch):
    def fn(w, x):
        return jnp.tanh(x @ w["in"]) @ w["out"]

    w = {"in": jnp.array([[1.0, 2, 3], [1, -1, 2]]), "out": jnp.array([[1.0], [2], [1]])}
    search = functools.partial(jaxinv.functional_dimension, max_bytes=max_bytes)
    monkeypatch.setattr("jaxinv.pages.counts.functional_dimension", search)
    found = describe(fn, w, jnp.ones((1, 2)), rank_limit=3)["freedom"]["everywhere"]
    assert (found["lower"], found["certain"], found["by"]) == (9, True, by)


def test_inputs_that_cannot_be_drawn_are_asked_for():
    def fn(w, x):
        return jax.nn.relu(w["table"][x].sum(1)) @ w["out"]

    w = {"table": jax.random.normal(jax.random.key(0), (4, 3)), "out": jnp.ones((3, 1))}
    found = describe(fn, w, jax.ShapeDtypeStruct((1, 2), jnp.int32), rank_limit=100)["freedom"]
    assert "integer inputs cannot be drawn" in found["refused"]
    found = describe(fn, w, jnp.array([[0, 1], [2, 3]]), rank_limit=100)["freedom"]
    assert found["rank"] == 2 and not found["compared"]
    assert "between whole numbers" in found["everywhere"]["refused"]


def test_a_wide_layer_is_cut_to_its_heaviest_units_and_says_so():
    w = networks.init_mlp(jax.random.key(0), (2, 60, 1))
    data = embedded(model_page(networks.mlp, w, jnp.ones((1, 2)), rank_limit=1))
    units = data["picture"]["units"]
    assert data["picture"]["columns"][1]["total"] == 60 and units["column"].count(1) == 20
    flow = np.sum(w["Dense_0"]["kernel"] ** 2, 0) * w["Dense_1"]["kernel"][:, 0] ** 2
    shown = [i for i, c in zip(units["index"], units["column"], strict=True) if c == 1]
    assert shown == sorted(np.argsort(-flow)[:20].tolist())


def test_the_command_writes_a_page(tmp_path, capsys):
    (tmp_path / "model.py").write_text(
        "import jax.numpy as jnp\ndef model():\n"
        "    return (lambda w, x: x @ w), jnp.ones((2, 2)), jnp.ones((1, 2))\n"
    )
    out = tmp_path / "page.html"
    assert cli.main(["report", f"{tmp_path / 'model.py'}:model", "--out", str(out)]) == 0
    assert embedded(out.read_text())["parameters"] == 4 and str(out) in capsys.readouterr().out


def test_a_damaged_or_unfinished_experiment_is_refused(tmp_path, capsys):
    path = tmp_path / "results.json"
    header = {"experiment": "path-sgd", "config": {}, "environment": {}, "studies": {}}
    files.write_json(path, {**header, "complete": False})
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "not finished" in capsys.readouterr().err
    files.write_json(path, {**header, "complete": True})
    path.write_text(path.read_text().replace("path-sgd", "geometry"))
    assert cli.main(["report", str(path), "--out", str(tmp_path / "page.html")]) == 2
    assert "checksum" in capsys.readouterr().err and not (tmp_path / "page.html").exists()


RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def finished():
    """A finished run: what its file says, read without jaxinv, and its page."""
    content = json.loads((RESULTS / "bayes" / "results.json").read_text())
    return content, experiment_page(RESULTS / "bayes")


def rows_of(content):
    """The table of the experiment on priors, from the numbers in its file."""
    for prior, cells in content["studies"].items():
        difference = content["differences"][prior]
        z = np.abs(difference["z"])
        for cell in cells.values():
            mean, error = (cell[k][z.argmax()] for k in ("mean", "standard_error"))
            log_density = cell["log_density"]
            r_hat = max(*cell["r_hat"], log_density["r_hat"])
            ess = min(*cell["ess"], log_density["ess"])
            numbers = f"{mean:.4f} ± {error:.4f}|{z.max():.1f}|{r_hat:.4f}|{ess:.0f}"
            yield [*numbers.split("|"), str(cell["divergences"])]


def test_the_page_of_a_finished_experiment_holds_the_numbers_of_its_file(finished):
    content, text = finished
    data = embedded(text)
    assert [row[2:] for row in data["table"]["rows"]] == list(rows_of(content))
    assert data["table"]["numeric"] == [False] * 2 + [True] * 5
    assert data["config"] == content["config"] and data["environment"] == content["environment"]
    digest = hashlib.sha256((RESULTS / "bayes" / "results.json").read_bytes()).hexdigest()
    assert data["sha256"] == digest and data["title"] == "bayes"
    image = base64.b64decode(data["figure"].removeprefix("data:image/png;base64,"))
    assert image.startswith(b"\x89PNG") and data["caption"].startswith("How far the predictive")
    assert experiment_page(RESULTS / "bayes" / "results.json") == text


def test_a_finished_file_that_lacks_a_cell_is_refused(tmp_path, finished):
    content = {k: v for k, v in finished[0].items() if k != "sha256"}
    kept = {"gaussian": content["studies"]["gaussian"]}
    files.write_json(tmp_path / "results.json", {**content, "studies": kept})
    with pytest.raises(InvalidInput, match="the results lack jeffreys: plain"):
        experiment_page(tmp_path)


# --- in a browser ---------------------------------------------------------------------


def drawn(text, tmp_path, fragment=""):
    """The page after its script has run; fails on anything that the console reports."""
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    flags += " --disable-background-networking --disable-component-update --enable-logging=stderr"
    flags += " --host-resolver-rules=MAP\t*\t~NOTFOUND --window-size=1280,900 --dump-dom"
    command = [CHROMIUM, *(f.replace("\t", " ") for f in flags.split(" ")),
               f"--user-data-dir={tmp_path / 'profile'}", f"file://{path}{fragment}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    return Page(done.stdout)


@browser
def test_a_browser_draws_the_numbers_and_the_view_moves(page, tmp_path):
    data, seen = embedded(page), drawn(page, tmp_path, "#check")
    assert seen.fields["parameters"] == "54" and seen.fields["dimension"] == "9"
    freedom = data["freedom"]
    assert seen.fields["rank"] == str(freedom["rank"])
    assert float(seen.fields["path-norm"]) == pytest.approx(10 ** data["log10_path_norm"], rel=1e-3)
    assert seen.text["sum"].startswith(
        f"54 parameters = {freedom['rank']} degrees of freedom + {freedom['rescaling']} rescalings"
    )
    assert "All units are shown. All 43 lines are shown." in seen.text["shown"]
    kinds = {kind: seen.count("g", **{"data-kind": kind}) for kind in ("input", "hidden", "output")}
    assert kinds == {"input": 3, "hidden": 9, "output": 2}
    assert sum("data-edge" in a for _, a in seen.tags) == 3 * 5 + 5 * 4 + 4 * 2
    assert sum("data-output" in a for _, a in seen.tags) == 2
    checked = json.loads(seen.text["checked"])
    assert checked["after"] == pytest.approx(checked["before"] * np.exp(0.8))
    start, zoomed, dragged = (
        [float(v) for v in re.findall(r"-?[\d.]+", checked[k])]
        for k in ("start", "zoomed", "dragged")
    )
    # The point under the pointer stays where it is.
    for axis, at in enumerate(checked["at"]):
        assert (at - start[axis]) / start[2] == pytest.approx((at - zoomed[axis]) / zoomed[2])
    np.testing.assert_allclose(np.subtract(dragged, zoomed), [30, -10, 0], atol=1e-6)
    units = data["picture"]["units"]
    for name, told in zip(units["name"], checked["unit"], strict=True):
        assert told.split("\n")[0] == name
    hidden = checked["unit"][units["name"].index("Dense_0/kernel out 2 → Dense_1/kernel in 2")]
    ratio = float(re.search(r"outgoing norm ([\d.e-]+)", hidden)[1])
    assert ratio == pytest.approx(units["ratio"][2], rel=1e-3)


@browser
def test_a_browser_shows_hostile_names_as_text(tmp_path):
    w = {"in": jnp.ones((2, 3)), EVIL: jnp.ones((3, 4)), "out": jnp.ones((4, 1))}
    seen = drawn(model_page(evil_net, w, jnp.ones((1, 2)), rank_limit=0), tmp_path)
    assert seen.text["leaves"].count(EVIL) == 1 and seen.count("img") == 0
    assert seen.fields["path-norm"] == "refused" and "rank" not in seen.fields
    assert seen.count("g", **{"data-kind": "fixed"}) == 2


@browser
def test_a_browser_shows_the_numbers_of_a_finished_experiment(finished, tmp_path):
    content, text = finished
    seen = drawn(text, tmp_path)
    rows = seen.rows("results")
    assert [row[2:] for row in rows[1:]] == list(rows_of(content)) and len(rows) == 5
    right = [a.get("class") == "n" for t, a in seen.tags if t == "th"][:7]
    assert right == [False] * 2 + [True] * 5
    told = {row[0].replace(" ", "_"): row[1] for row in seen.rows("config")[1:]}
    assert {k: float(v) for k, v in told.items()} == content["config"]
    told = {row[0].replace(" ", "_"): row[1] for row in seen.rows("environment")[1:]}
    versions = content["environment"]["versions"]
    assert told.pop("versions") == ", ".join(f"{k} {v}" for k, v in versions.items())
    assert told == {k: str(v) for k, v in content["environment"].items() if k != "versions"}
    assert seen.count("img", src=embedded(text)["figure"]) == 1


def test_names_that_no_encoding_can_write_are_in_the_page(tmp_path):
    name = "a\ud800\x9b\u202e λ"
    text = model_page(lambda w, x: x @ w[name], {name: jnp.ones((2, 1))}, jnp.ones((1, 2)),
                      title=name, rank_limit=1)  # fmt: skip
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    assert embedded(text)["leaves"][0]["name"] == name
    assert r"<title>a\ud800\x9b\u202e λ</title>" in text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"studies": 3}, "lacks studies"),
        ({"environment": {}}, "lacks environment.versions"),
        ({"config": None}, "lacks config"),
        ({"experiment": ["path-sgd"]}, "holds no results of an experiment"),
    ],
)
def test_what_a_finished_file_lacks_is_named(changed, message, tmp_path, finished):
    content = {k: v for k, v in finished[0].items() if k != "sha256"} | changed
    files.write_json(tmp_path / "results.json", content)
    with pytest.raises(JaxinvError, match=rf"results.json: .*({message})"):
        experiment_page(tmp_path)


@pytest.mark.parametrize("change", [lambda c: c.pop("mean"), lambda c: c.update(mean="text")])
def test_a_cell_that_lacks_numbers_is_named(change, tmp_path, finished):
    content = json.loads(json.dumps({k: v for k, v in finished[0].items() if k != "sha256"}))
    for cells in content["studies"].values():
        for cell in cells.values():
            change(cell)
    files.write_json(tmp_path / "results.json", content)
    with pytest.raises(files.DamagedFile, match="results.json: .*(lacks 'mean'|not of the kind)"):
        experiment_page(tmp_path)
