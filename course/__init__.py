"""The course: makes assignments of this project's functions, and grades what comes back.

    make.py         python -m course.make: list, make, solutions and rubric for the teacher
    grade.py        python -m course.grade: many submissions, several at a time, to a table or CSV
    exercises.py    what is suggested, with the tests that grade it
    solutions/      of the lessons in CUDA, which no handout contains
    source.py       functions of a file: find, blank, put another body in
    submission.py   a folder, zip or file that somebody handed in: the bodies that were asked for
    progress.py     what a handout adds to pytest

Code that was handed in never shares a process with the tests. judge.py runs the tests, in a copy
of the project in which each graded function asks seam.py for its result; the result comes from
worker.py, a process that holds the handed-in bodies and no solution, in sandbox.py's isolation.
Both speak link.py's messages: plain values, so that nothing a submission returns can run as code.
"""
