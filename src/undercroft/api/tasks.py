"""Tasks over REST, see `undercroft.operations.tasks`."""

from __future__ import annotations

from typing import Annotated

from litestar import Controller, Response, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, QueryParameter

from undercroft.api.answers import (
    AnyRequest,
    PageOf,
    answer_listing,
    answer_record,
    caller,
    errors,
    operations,
)
from undercroft.api.query import Query
from undercroft.model.errors import InvalidError
from undercroft.model.task import Task

MAX_WAIT = 60.0
WAIT = QueryParameter(
    name="wait",
    required=False,
    description=f"Answer when it is final, or after so many seconds (at most {MAX_WAIT:.0f}).",
)


class TaskController(Controller):
    """Looking at tasks, waiting for them, cancelling them."""

    path = "/v1/tasks"
    tags = ["tasks"]

    @get(operation_id="listTasks", summary="List tasks", responses=errors(304))
    async def list_tasks(
        self, request: AnyRequest, asked: NamedDependency[Query]
    ) -> Response[PageOf[Task]]:
        """All tasks that are still remembered."""
        listing = await operations(request).tasks.list(caller(request))
        return answer_listing(request, Task, listing, asked)

    @get(
        "/{id:str}",
        operation_id="getTask",
        summary="Show a task, or wait for it",
        responses=errors(304, 404),
    )
    async def get_task(
        self, request: AnyRequest, id: FromPath[str], wait: Annotated[float | None, WAIT] = None
    ) -> Response[Task]:
        """The task as it is; with `wait`, as it is once it is final."""
        tasks, who = operations(request).tasks, caller(request)
        if wait is None:
            return answer_record(request, await tasks.get(who, id))
        if not 0 <= wait <= MAX_WAIT:
            raise InvalidError(
                f"a wait of {wait:g} seconds is not possible",
                action=f"choose 0 to {MAX_WAIT:.0f}, and ask again",
            )
        return answer_record(request, await tasks.wait(who, id, wait))

    @post(
        "/{id:str}/cancel",
        operation_id="cancelTask",
        summary="Cancel a task",
        status_code=200,
        responses=errors(404, 409),
    )
    async def cancel_task(self, request: AnyRequest, id: FromPath[str]) -> Response[Task]:
        """Asks it to stop. What cannot be undone any more is finished instead."""
        return answer_record(request, await operations(request).tasks.cancel(caller(request), id))
