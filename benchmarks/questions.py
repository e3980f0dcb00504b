"""Public question benchmarks as rows of `evaluate.py vqa --score ...`, and the marks they give.

A row is a conversation, the answer its second message; `kind` names its line of the results, and
marks may need "tolerance" (number), or "box" [left, top, right, bottom] in fractions of the image
or "mask" (an image, white where right; point), a path beside the .jsonl. One line each, `r` being a
row as published, `i` its number, `ask` and `save` as in the README:

    BLINK       ask(r["prompt"], r["answer"], r["sub_task"], *[r[f"image_{k}"] for k in range(1, 5)])
    MMStar      ask(r["question"], r["answer"], r["category"], r["image"])
    RoboSpatial ask(r["question"], r["answer"], r["category"], r["img"])
    pointing    {**ask(r["question"], "", "context", r["img"]), "mask": save(r["mask"], f"m{i}.png")}
"""
