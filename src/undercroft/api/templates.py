"""Templates over REST, see `undercroft.operations.templates`."""

from __future__ import annotations

from litestar import Controller, Response, delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

from undercroft.api.answers import (
    AnyRequest,
    PageOf,
    answer_listing,
    answer_record,
    answer_task,
    answer_tasks,
    caller,
    errors,
    operations,
)
from undercroft.api.query import Query
from undercroft.model.requests import CloneRequest, TaskList, TemplateCreate
from undercroft.model.task import Task
from undercroft.model.template import Template


class TemplateController(Controller):
    """Making templates, looking at them, making VMs from them."""

    path = "/v1/templates"
    tags = ["templates"]

    @get(operation_id="listTemplates", summary="List templates", responses=errors(304))
    async def list_templates(
        self, request: AnyRequest, asked: NamedDependency[Query]
    ) -> Response[PageOf[Template]]:
        """All templates."""
        listing = await operations(request).templates.list(caller(request))
        return answer_listing(request, Template, listing, asked)

    @post(
        operation_id="createTemplate",
        summary="Make a template",
        status_code=202,
        responses=errors(404, 409, 501, 502, 507),
    )
    async def create_template(
        self, request: AnyRequest, data: JSONBody[TemplateCreate]
    ) -> Response[Task]:
        """Freezes what a VM is now; the VM goes on. The task's result names the template."""
        return answer_task(await operations(request).templates.create(caller(request), data))

    @get(
        "/{ref:str}",
        operation_id="getTemplate",
        summary="Show a template",
        responses=errors(304, 404),
    )
    async def get_template(self, request: AnyRequest, ref: FromPath[str]) -> Response[Template]:
        """The template with this name or id."""
        return answer_record(request, await operations(request).templates.get(caller(request), ref))

    @post(
        "/{ref:str}/clone",
        operation_id="cloneTemplate",
        summary="Make VMs from a template",
        status_code=202,
        responses=errors(404, 409, 501, 507),
    )
    async def clone_template(
        self, request: AnyRequest, ref: FromPath[str], data: JSONBody[CloneRequest]
    ) -> Response[TaskList]:
        """Makes VMs that begin as the template is; a task for each."""
        return answer_tasks(await operations(request).templates.clone(caller(request), ref, data))

    @delete(
        "/{ref:str}",
        operation_id="removeTemplate",
        summary="Remove a template",
        status_code=200,
        responses=errors(404, 409),
    )
    async def remove_template(self, request: AnyRequest, ref: FromPath[str]) -> Response[Template]:
        """VMs that were made from it keep what they need of it. Answers with what it was."""
        return Response(await operations(request).templates.remove(caller(request), ref))
