from disha.text import join


def test_join():
    assert [join("", "a"), join("a", ""), join("a", "b"), join("", "")] == ["a", "a", "a.b", ""]
