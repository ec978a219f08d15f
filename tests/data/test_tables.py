"""Tables of boxes: the usual headers mean the same boxes; what is not understood is refused."""

from pathlib import Path

import pytest

from foveola.data.sample import DataError
from foveola.data.tables import read_boxes

WANT = {"a.jpg": [(30, 20, 70, 60, "cat")], "b.jpg": [(0, 0, 640, 480, "dog")]}


def read(tmp_path: Path, text: str):
    (tmp_path / "boxes.csv").write_text(text)
    return read_boxes(tmp_path / "boxes.csv")


@pytest.mark.parametrize(
    "header",
    [
        "name,x0,y0,x1,y1,label",
        "filename,xmin,ymin,xmax,ymax,class",
        "image,x_min,y_min,x_max,y_max,category",
        "file_name,x1,y1,x2,y2,class_name",
        "Image Path,Left,Top,Right,Bottom,Label",
    ],
)
def test_corners(tmp_path: Path, header: str):
    assert read(tmp_path, f"{header}\na.jpg,30,20,70,60,cat\nb.jpg,0,0,640,480,dog\n") == WANT


@pytest.mark.parametrize(
    "header",
    ["name,x,y,w,h,label", "file,x,y,width,height,class", "path,left,top,width,height,category_name",
     "image_name,bbox_x,bbox_y,bbox_width,bbox_height,label_name"],
)  # fmt: skip
def test_width_and_height(tmp_path: Path, header: str):
    assert read(tmp_path, f"{header}\na.jpg,30,20,40,40,cat\nb.jpg,0,0,640,480,dog\n") == WANT


def test_a_header_gives_the_order_and_other_columns_are_left_out(tmp_path: Path):
    text = "width,height,class,ymin,xmin,ymax,xmax,score,filename\n"
    text += "640,480,cat,20,30,60,70,0.9,a.jpg\n640,480,dog,0,0,480,640,0.8,b.jpg\n"
    assert read(tmp_path, text) == WANT


def test_without_a_header_corners_are_in_the_documented_order(tmp_path: Path):
    assert read(tmp_path, "a.jpg,30,20,70,60,cat\nb.jpg,0,0,640,480,dog\n") == WANT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name,cx,cy,w,h\na.jpg,1,2,3,4",
            "line 1: header name,cx,cy,w,h is not understood; name the columns",
        ),
        ("x0,y0,x1,y1\n1,2,3,4", "line 1: header x0,y0,x1,y1 is not understood"),
        ("name,x0,x0,x1,y1\na.jpg,1,2,3,4", "names a column twice"),
        ("name;x0;y0;x1;y1\na.jpg;1;2;3;4", "line 1: fields are separated by semicolons; write commas"),
        ("a.jpg\t1\t2\t3\t4", "line 1: fields are separated by tabs; write commas"),
        ("a.jpg,1,2,3,4,cat,0.9", "line 1: 7 fields without a header"),
        ("name,x0,y0,x1,y1,label\na.jpg,1,2,3,4", "line 2: 5 fields, fewer than the header names"),
        ("a.jpg,30,20,20,40", r"box 30, 20, 20, 40 ends before it begins: are these x, y, width, height\?"),
        ("name,x,y,w,h\na.jpg,30,20,-5,9", "has no area"),
        ("", "holds no box"),
        ("name,x0,y0,x1,y1,label\n\n", "holds no box"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, message: str):
    with pytest.raises(DataError, match=message):
        read(tmp_path, text)
