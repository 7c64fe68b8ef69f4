import contextlib
import threading

from absl.testing import absltest

from kimi_jax.interop.ahead import AHEAD, THREADS, in_order


class AheadTest(absltest.TestCase):
    def test_results_come_in_the_order_of_tasks_whichever_is_ready_first(self):
        second_is_done = threading.Event()

        def work(i):
            if i == 0:
                second_is_done.wait(10)
            elif i == 1:
                second_is_done.set()
            return i * i

        found = list(in_order(work, ((i,) for i in range(20))))
        self.assertEqual(found, [((i,), i * i) for i in range(20)])

    def test_no_more_tasks_are_taken_than_may_wait(self):
        taken = []

        def tasks():
            for i in range(100):
                taken.append(i)
                yield (i,)

        with contextlib.closing(in_order(abs, tasks())) as results:
            for _ in range(3):
                next(results)
        self.assertLen(taken, THREADS + AHEAD + 2)

    def test_error_of_a_task_is_raised_in_its_turn(self):
        def work(i):
            return 1 // (3 - i)

        results = in_order(work, ((i,) for i in range(10)))
        self.assertEqual([next(results)[0] for _ in range(3)], [(0,), (1,), (2,)])
        with self.assertRaises(ZeroDivisionError):
            next(results)

    def test_no_tasks_give_no_results(self):
        self.assertEmpty(list(in_order(len, ())))


if __name__ == "__main__":
    absltest.main()
